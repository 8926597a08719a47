"""Opens the vision-language model, and says what is missing for that and how much memory it takes.

Imports PyTorch when it is called, so that a command can say in one line that it is not installed.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from prophy_jax.run import hub
from prophy_jax.run.errors import UserError, counted

if TYPE_CHECKING:
    from prophy_jax.labels.labelling import View
    from prophy_jax.labels.vlm import Reading, Vlm


def import_labelling(config: ConfigDict):
    """The module `labels.labelling`. UserError when its packages are missing, or a setting does not exist."""
    try:
        from prophy_jax.labels import labelling
    except ImportError as error:
        raise UserError(
            f'{error}: the labels need more packages: pip install "/path/to/prophy_jax[label]", which is the '
            "folder of this project"
        ) from error
    labelling.check_settings(config.label)
    return labelling


def open_model(folder: str | Path, config: ConfigDict, process: int) -> tuple["Vlm", dict[str, str]]:
    """The model, of a folder or of the hub, and what the manifest says of it. UserError as `vlm.load`."""
    from prophy_jax.labels import vlm

    origin = {}
    if repository := hub.find(str(folder), vlm.PATTERNS):
        folder = repository.fetch(vlm.choose)
        origin = {"name": repository.name, "revision": repository.commit}
    described = vlm.describe(folder) | origin
    device = vlm.choose_device(folder, process)
    print(f"opening {described['name']} on {device}", flush=True)
    model = vlm.load(folder, device, config.label.dtype)
    model.check_template()
    return model, described


def open_reader(
    config: ConfigDict, model_folder: str | Path, process: int = 0
) -> tuple["Vlm", dict[str, str], "Reading"]:
    """The model, what the manifest says of it, and its attention that is read. UserError as `open_model`."""
    labelling = import_labelling(config)
    model, described = open_model(model_folder, config, process)
    layers = labelling.choose_layers(config.label.layers, model.num_layers)
    return model, described, labelling.make_reading(config.label, layers)


def describe_view(bucket: str, view: "View", model: "Vlm", config: ConfigDict) -> str:
    """Lines that say how large the model's view is and how much memory it will take."""
    settings = config.label
    times, height, width = view.shown
    need = {
        name: f"{size / 2**30:.1f}"
        for name, size in model.memory(view.shown, settings.batch, 4, settings.max_new_tokens).items()
    }
    text = (
        f"{bucket}: {times} x {height} x {width} video tokens, frames of {28 * height}x{28 * width}; for "
        f"{counted(settings.batch, 'clip')} at a time, each with 3 phenomena, about {need['peak']} GiB: "
        f"weights {need['weights']}, keys and values {need['cache']}"
    )
    last = int((times - 1) * model.time_step(view.seconds))
    if last >= max(height, width):
        text += (
            f"\n{bucket}: note: few cells for so long a clip: temporal positions reach {last}, those of the "
            f"text begin at {max(height, width)}; a smaller config.label.cell keeps them apart"
        )
    return text
