"""What is measured of a finished run: the diffusion loss and clips of any model, and what its parts bring.

A part (`models.beside`) brings its measures as a file of this package and a row of MEASURES. The file has:

    TITLE, TEMPLATE          what the report calls the part, and a template of this package with the macros
                             `introduction`, `tiles`, `sections` and `settings`; they read `results`, and of
                             `part` its config, view and shown
    FIELDS                   fields of the batch that it reads, see `data.batch`
    keep(before, after)      -> {name: (B, ...)}: arrays to keep of a forward pass, from what the part's
                             `leave` returned with the parameters of step 0 and with those of now
    summarise(part, clips, kept)                     -> results for metrics.json
    view(results)                                    -> what else the template reads, such as charts
    show(part, clips, kept, captions, decode, grid)  -> pictures of a few clips for the template

B batch.
"""

import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

MEASURES = {"prophy": "routing"}  # file of models/beside -> file of this package


def measures(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, ModuleType]:
    """For each part of `config.parts` that has measures, their file."""
    return {
        name: importlib.import_module(f"{__name__}.{MEASURES[spec['module']]}")
        for name, spec in parts.items()
        if spec and spec["module"] in MEASURES
    }


def name_parts(parts: Iterable[str]) -> str:
    """As the report calls them, such as "the branch"; "" of a backbone alone."""
    return " and ".join(f"the {name}" for name in parts)
