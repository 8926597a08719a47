"""The share of the wall time that trained, of runs that were killed and resumed."""

import time

import pytest

from prophy_jax.run.goodput import Goodput


def spent(clock: Goodput) -> dict[str, float]:
    values = clock.values()
    return {kind: round(values[f"goodput/{kind}_s"], 1) for kind in ("train", "start", "save", "repeated")}


def line(step: int, train: float, start: float, save: float) -> dict[str, float]:
    return {"step": step, "goodput/train_s": train, "goodput/start_s": start, "goodput/save_s": save}


def test_steps_after_the_last_checkpoint_are_lost_when_they_are_done_again():
    lines = [{"step": 0}, line(5, 50, 20, 0), line(10, 100, 20, 2), line(15, 150, 20, 4)]
    assert spent(Goodput([], 0)) == {"train": 0, "start": 0, "save": 0, "repeated": 0}
    assert spent(Goodput(lines, 10)) == {"train": 100, "start": 20, "save": 4, "repeated": 50}
    assert spent(Goodput(lines, 15)) == {"train": 150, "start": 20, "save": 4, "repeated": 0}
    assert spent(Goodput(lines, 0)) == {"train": 0, "start": 20, "save": 4, "repeated": 150}
    # Killed again before its first line: what is lost is lost once.
    carried = Goodput(lines, 10).values()
    assert spent(Goodput([*lines[:2], {**lines[2], **carried}], 10)) == spent(Goodput(lines, 10))


def test_all_time_is_of_some_kind():
    clock = Goodput([line(5, 3600, 0, 0)], 5)
    clock.spend("start")  # since this process began
    began = time.perf_counter()
    time.sleep(0.05)
    clock.spend("train")
    clock.spend("save")
    values = clock.values()
    took = time.perf_counter() - began
    assert values["goodput/train_s"] + values["goodput/save_s"] == pytest.approx(3600 + took, abs=0.01)
    total = sum(value for name, value in values.items() if name.endswith("_s"))
    assert values["goodput/share"] == pytest.approx(values["goodput/train_s"] / total)
    assert clock.describe().startswith(f"goodput: {100 * values['goodput/share']:.1f}% of 1 h ")
