"""Names → generators, fitted models and networks. A plug-in is a name here and a pass of the shared suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cohortium.common.errors import StudyError

if TYPE_CHECKING:
    from cohortium.common.generators.base import Facts, Generator, Model


def generator(name: str, facts: Facts, *, rounds: int | None = None) -> Generator:
    from cohortium.common.generators.mixture import Mixture

    if name in ("mixture", "auto"):
        return Mixture()
    raise StudyError("STUDY-GENERATOR", f"there is no generator {name!r}")


def load_model(arrays: Mapping[str, Any], header: Mapping[str, Any]) -> Model:
    from cohortium.common.generators.model import MixtureModel

    return MixtureModel.from_arrays(arrays, header)


def network(spec: Mapping[str, Any]) -> Any:
    raise StudyError("STUDY-NETWORK", "unknown network")
