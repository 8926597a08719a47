"""Who works through the items of a command: this process, or the workers of a Ray cluster.

    with engine.workers("ray", make, devices=1) as workers:
        facts = workers.ask(tell)
        results = workers.share(do, items, total=len(clips), unit="clip")

`make()` builds a worker: whatever takes long to build and is used for every item, such as a model on its
device. `do(worker, items, tick)` is a generator that works through some items in order, gives a result for
each, and calls tick(n) when n more units are done. What they take and give is pickled for Ray, functions and
classes by name: they must be in modules that can be imported, and every node needs this program and the same
paths.

On a cluster each group of `devices` GPUs (TPU chips where there are no GPUs) has a worker, or each node where
there are neither. An item of a node or a process that ended is given to another worker. Nodes that join get
workers.
"""

import collections
import contextlib
import functools
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tqdm

import prophy_jax
from prophy_jax.run import checksums, signals
from prophy_jax.run.errors import UserError, counted

HELP = (
    "Who does the work: ray is the Ray cluster of RAY_ADDRESS, else the one that this machine is a node of, "
    "else this machine alone; ray:HOST:PORT is the one with that head node. Default: this process."
)
DEVICES_HELP = "GPUs or TPU chips of each worker of --engine=ray, for models that need several."
LOST = 4  # so often an item may take its worker down
UNBUILT = 8  # so often a worker may end while it is built
TICK_S = 1.0  # between looks at the progress
LOOK_S = 5.0  # between looks for new nodes
SLOW_S = 60.0  # without any worker, a line says so
CONNECT_S = 10.0
_SETTINGS = ("JAX_", "XLA_", "OMP_NUM_THREADS")  # environment variables that workers take from the command

Do = Callable[[Any, Iterable[Any], Callable[[int], Any]], Iterator[Any]]


class Workers:
    """One or several workers, all made alike; see the top of this file."""

    def share(self, do: Do, items: Sequence[Any], total: int = 0, unit: str = "clip") -> list[Any]:
        """The results of all items, in their order.

        Args:
            do: see the top of this file.
            items: in the order in which they are begun.
            total: units that the progress bar counts; 0 shows none.
            unit: what they are called.

        Raises:
            UserError: as `do` and the building of a worker do.
        """
        raise NotImplementedError

    def ask(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """do(worker, *arguments) of any one of the workers."""
        [answer] = self.share(functools.partial(_answer, do), [arguments])
        return answer


def _answer(do: Callable[..., Any], worker: Any, items: Iterable[Any], tick: Any) -> Iterator[Any]:
    for arguments in items:
        yield do(worker, *arguments)


class _Here(Workers):
    def __init__(self, make: Callable[[], Any]) -> None:
        self._worker = make()

    def share(self, do: Do, items: Sequence[Any], total: int = 0, unit: str = "clip") -> list[Any]:
        if not items:
            return []
        with _bar(total, unit) as bar:
            return list(do(self._worker, items, bar.update))


def _bar(total: int, unit: str) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, unit=unit, dynamic_ncols=True, disable=not total)


@contextlib.contextmanager
def workers(engine: str | None, make: Callable[[], Any], devices: int = 1) -> Iterator[Workers]:
    """Workers that are there while the body runs.

    Args:
        engine: None for this process; "ray" or "ray:HOST:PORT", see HELP.
        make: builds a worker.
        devices: GPUs or TPU chips of each worker of a cluster.

    Raises:
        UserError: there is no such engine or cluster, or as `make` does.
    """
    if engine is None:
        if devices != 1:
            raise UserError(f"--devices={devices} is about the workers of --engine=ray: name that too")
        yield _Here(make)
        return
    ray = _import(engine)
    with _cluster(ray, engine.partition(":")[2]):
        crew = _OnRay(ray, make, devices)
        try:
            yield crew
        finally:
            crew.end()


# --- Ray -------------------------------------------------------------------------------------------


def _import(engine: str) -> Any:
    """The package ray. Raises UserError on another engine, and where it is not installed."""
    name, _, address = engine.partition(":")
    host, _, port = address.rpartition(":")
    if name != "ray" or (address and not (host and port.isdigit())) or host.startswith("//"):
        raise UserError(
            f"--engine={engine}: give ray, or ray:HOST:PORT with the port of `ray start --head`; from a "
            "machine that is no node of the cluster, `ray job submit` starts the command on one"
        )
    # Ray reads these when it is imported. It reports no usage, and does not warn of what will change in it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f'--engine={engine} needs more packages ({error}): pip install "/path/to/prophy_jax[ray]", which '
            "is the folder of this project, on every node"
        ) from error
    return ray


@contextlib.contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """Connects to a cluster, or starts one on this machine; a program that has done so keeps its own."""
    if ray.is_initialized():
        yield
        return
    named = address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = named.rpartition(":")
    if host and port.isdigit():  # Ray itself would try for minutes, and then end the process
        try:
            socket.create_connection((host, int(port)), CONNECT_S).close()
        except OSError as error:
            raise UserError(
                f"no Ray cluster at {named} ({error}): start one with `ray start --head`, or name the "
                "address that it printed"
            ) from error
    before = signal.getsignal(signal.SIGTERM)
    ended = (
        f"the Ray cluster {named or 'of this machine'} has ended, or this command was killed: what is "
        "finished is kept; run the same command again"
    )
    with signals.last_words(ended):  # Ray ends a process that has lost its cluster
        try:
            ray.init(
                address or None, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
            )
        except (ConnectionError, RuntimeError, ValueError) as error:  # RuntimeError: another version of Ray
            raise UserError(
                f"cannot join the Ray cluster {named}: {error}; if it asks for a token, set "
                "RAY_AUTH_MODE=token"
            ) from error
        if threading.current_thread() is threading.main_thread():  # elsewhere Ray has not set its own
            signal.signal(signal.SIGTERM, before)
        try:
            yield
        finally:
            ray.shutdown()


class _Actor:
    """A worker in a process of a cluster. `work` runs in one thread, and `done` beside it."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._done = 0

    def open(self, settings: dict[str, Any], make: bytes) -> dict[str, Any]:
        """Builds the worker as the command would in its own process."""
        return _caught(lambda: self._open(settings, make))

    def _open(self, settings: dict[str, Any], make: bytes) -> None:
        host = socket.gethostname()
        if prophy_jax.__version__ != settings["version"]:
            raise UserError(
                f"{host} has prophy_jax {prophy_jax.__version__}, this machine {settings['version']}: "
                "install the same on every node"
            )
        try:
            os.chdir(settings["folder"])
        except OSError as error:
            raise UserError(
                f"the folder {settings['folder']} cannot be seen on {host} ({error.strerror}): run the "
                "command in a folder on storage that all nodes share"
            ) from error
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to 1
        os.environ.update(settings["environment"])
        sys.path += [path for path in settings["path"] if path not in sys.path]
        checksums.enabled = settings["verify"]
        with contextlib.suppress(ImportError):
            from absl import logging as absl_logging

            absl_logging.set_verbosity(absl_logging.ERROR)
        if self._worker is None:
            self._worker = pickle.loads(make)()

    def work(self, do: bytes, item: Any) -> dict[str, Any]:
        self._done = 0

        def tick(count: int) -> None:
            self._done += count

        def one() -> tuple[Any, int]:
            [result] = pickle.loads(do)(self._worker, [item], tick)
            return result, self._done

        return _caught(one)

    def done(self) -> int:
        """Units of the item that is worked on."""
        return self._done


def _caught(body: Callable[[], Any]) -> dict[str, Any]:
    """{"value": what `body` gives}, or {"error": the user's} as text, which any exception can be sent as."""
    try:
        return {"value": body()}
    except UserError as error:
        return {"error": " ".join(str(error).split()), "host": socket.gethostname()}


class _OnRay(Workers):
    """Actors of a cluster.

    Ray starts those again whose process ended. It would also give them their item again, but on a node that
    may be gone for hours while others have nothing to do: so this class gives items out, one at a time.
    `ray.util.ActorPool` raises when an actor is lost, and forgets which item it had. Ray Data (2.60) builds
    its actors anew for each call, counts nothing within an item, and fails on a lost node where retries are
    bounded.
    """

    def __init__(self, ray: Any, make: Callable[[], Any], devices: int) -> None:
        from ray import cloudpickle, exceptions
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._devices, self._dumps = ray, devices, cloudpickle.dumps
        self._affinity, self._failed, self._broken = (
            NodeAffinitySchedulingStrategy, exceptions.RayTaskError, exceptions.RayError,
        )  # fmt: skip
        self._make = ray.put(cloudpickle.dumps(make))
        self._settings = {
            "version": prophy_jax.__version__,
            "folder": os.getcwd(),
            "environment": {key: value for key, value in os.environ.items() if key.startswith(_SETTINGS)},
            "path": [path for path in sys.path if path],
            "verify": checksums.enabled,
        }
        self._actors: dict[tuple[str, int], Any] = {}  # by node and number there
        self._hosts: dict[str, str] = {}  # node -> name
        self._free: list[tuple[str, int]] = []  # those that are built and have nothing to do
        self._opening: dict[Any, tuple[str, int]] = {}  # answer to come -> actor
        self._gone: list[tuple[str, int]] = []  # those to build again, if their nodes are still there
        self._ended: collections.Counter = collections.Counter()  # actor -> times, while it was built
        self._looked = -LOOK_S
        self._grow()
        if not self._actors:
            raise UserError(
                "no node of the Ray cluster has a CPU, GPU or TPU to work on"
                + (f", or {devices} GPUs or TPU chips, as --devices={devices} asks" if devices > 1 else "")
            )

    def end(self) -> None:
        for actor in self._actors.values():
            with contextlib.suppress(Exception):  # it is gone
                self._ray.kill(actor)

    def _grow(self) -> None:
        """Starts an actor wherever there is room for one, and has it built again where its process ended.

        Forgets nodes that are gone.
        """
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        kinds = [kind for kind in ("GPU", "TPU") if any(node["Resources"].get(kind) for node in nodes)]
        kind = kinds[0] if kinds else "CPU"
        wanted = {}
        for node in nodes:
            self._hosts[node["NodeID"]] = node["NodeManagerHostname"]
            count = int(node["Resources"].get(kind, 0))
            count = count // self._devices if kinds else min(count, 1)
            wanted |= {(node["NodeID"], number): node["NodeID"] for number in range(count)}
        for key in [key for key in self._actors if key not in wanted]:
            self._drop(key)
        for key in self._gone:
            self._open(key)
        self._gone = []
        needs = {
            "GPU": {"num_gpus": self._devices},
            "TPU": {"resources": {"TPU": self._devices}},
            "CPU": {"num_cpus": 1},
        }
        for key, node in wanted.items():
            if key not in self._actors:
                self._actors[key] = (
                    self._ray.remote(_Actor)
                    .options(
                        **needs[kind],
                        max_restarts=-1,
                        max_concurrency=2,
                        scheduling_strategy=self._affinity(node, soft=False),
                    )
                    .remote()
                )
                self._open(key)

    def _open(self, key: tuple[str, int]) -> None:
        self._opening[self._actors[key].open.remote(self._settings, self._make)] = key

    def _drop(self, key: tuple[str, int]) -> None:
        self._actors.pop(key)
        self._free, self._gone = (
            [other for other in keys if other != key] for keys in (self._free, self._gone)
        )
        self._opening = {answer: other for answer, other in self._opening.items() if other != key}

    def _value(self, answer: Any, key: tuple[str, int]) -> Any:
        """What an actor answered. Raises UserError for what it refused, RayError where it is lost."""
        try:
            found = self._ray.get(answer)
        except self._failed as error:
            if "failed to import" in str(error):  # Ray's own text
                raise UserError(
                    f"{self._hosts[key[0]]} cannot import prophy_jax: install the same program on every node"
                ) from error
            raise
        if "error" in found:
            elsewhere = found["host"] != socket.gethostname()
            raise UserError(found["error"] + (f" (on {found['host']})" if elsewhere else ""))
        return found["value"]

    def share(self, do: Do, items: Sequence[Any], total: int = 0, unit: str = "clip") -> list[Any]:
        if not items:
            return []
        function = self._ray.put(self._dumps(do))
        waiting = collections.deque(range(len(items)))
        results: dict[int, Any] = {}
        working: dict[Any, tuple[tuple[str, int], int]] = {}  # answer to come -> actor and item
        lost: collections.Counter = collections.Counter()  # item -> times
        finished, progress, polls = 0, {}, {}  # units; of items under way; answers to come -> item
        looked = quiet = time.monotonic()
        with _bar(total, unit) as bar:
            while len(results) < len(items):
                self._grow()
                while waiting and self._free:
                    key, index = self._free.pop(0), waiting.popleft()
                    working[self._actors[key].work.remote(function, items[index])] = key, index
                if working:
                    quiet = time.monotonic()
                elif time.monotonic() - quiet > SLOW_S:
                    quiet = float("inf")
                    bar.write("no worker is there: `ray status` says who uses the nodes", sys.stderr)
                if time.monotonic() - looked > TICK_S:
                    looked = time.monotonic()
                    open_polls = set(polls.values())
                    for key, index in working.values():
                        if total and index not in open_polls:
                            polls[self._actors[key].done.remote()] = index
                answers = [*self._opening, *working, *polls]
                for answer in self._ray.wait(answers, timeout=TICK_S)[0] if answers else ():
                    if answer in polls:
                        index = polls.pop(answer)
                        with contextlib.suppress(self._broken):
                            progress[index] = self._ray.get(answer)
                    elif answer in self._opening:
                        self._opened(answer)
                    else:
                        key, index = working.pop(answer)
                        try:
                            results[index], units = self._value(answer, key)
                            finished += units
                            self._free.append(key)
                        except self._failed:
                            raise
                        except self._broken as error:
                            self._lost(key, index, lost, error, bar)
                            waiting.appendleft(index)
                        progress.pop(index, None)
                        polls = {poll: other for poll, other in polls.items() if other != index}
                bar.update(finished + sum(progress.values()) - bar.n)
                if not answers:  # all nodes are gone
                    time.sleep(TICK_S)
        return [results[index] for index in range(len(items))]

    def _opened(self, answer: Any) -> None:
        key = self._opening.pop(answer)
        try:
            self._value(answer, key)
        except self._failed:
            raise
        except self._broken as error:
            self._ended[key] += 1
            if self._ended[key] == UNBUILT:
                raise UserError(
                    f"a worker on {self._hosts[key[0]]} ended {UNBUILT} times while it was built, perhaps "
                    f"for lack of memory: {_first_line(error)}"
                ) from error
            self._gone.append(key)
        else:
            self._ended[key] = 0
            self._free.append(key)

    def _lost(self, key: tuple[str, int], index: int, lost: Any, error: Exception, bar: Any) -> None:
        """Says that the worker of an item is gone. Raises UserError if that happened too often."""
        lost[index] += 1
        host = self._hosts[key[0]]
        if lost[index] == LOST:
            raise UserError(
                f"{counted(LOST, 'worker')} ended while doing the same piece of work, the last on {host}, "
                f"perhaps for lack of memory ({_first_line(error)}); what is finished is kept"
            ) from error
        bar.write(f"a worker on {host} was lost; its work is given to another", sys.stderr)
        self._gone.append(key)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
