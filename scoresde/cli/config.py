"""A training run in words: dataclasses, the TOML file that they are read from and written to, and `--set`."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_keys, check_nonnegative, check_option, one_of
from scoresde.cli.items import DataConfig
from scoresde.files import parsed, write_whole
from scoresde.metrics import METRICS
from scoresde.sde import SDE
from scoresde.training.config import TrainConfig
from scoresde.training.model import CategoricalConfig, ModelConfig
from scoresde.training.weights import (
    ImportanceTimes,
    LevelTimes,
    LogNormalTimes,
    TimeSampler,
    UniformTimes,
    Weighting,
    discrete_bound,
    edm,
    likelihood,
    min_snr,
    simple,
    uniform_in,
)

__all__ = [
    "CATEGORICAL",
    "CategoricalRun",
    "DataConfig",
    "EvaluateConfig",
    "InSections",
    "LossConfig",
    "RunConfig",
    "check_installed",
    "override",
    "read_toml",
    "section",
    "write_toml",
]

T = TypeVar("T")


@dataclass(frozen=True)
class LossConfig:
    """Where the loss puts its effort: `scoresde.training.weights`.

    Args:
        weighting: weight 1 on the error of the noise ("simple"), x0, v, velocity or score; "min-snr", "edm" (with the
            model's sigma_data), "likelihood", or on a chain "bound", that of its steps with the posterior variance.
        gamma: of "min-snr".
        times: "uniform", "log-normal", "importance" (for "likelihood") or "levels".
        mean, std: of "log-normal" times, of log(sigma / alpha).
        stratified: spread each batch evenly over the times.
        unconditional: weight of a second term, the loss of a network that is told nothing, in every batch
            (`two_term_loss`): for guidance without a classifier, instead of data.drop.
        noise_levels: how many "levels" there are.
    """

    weighting: Literal["simple", "min-snr", "edm", "likelihood", "bound", "x0", "v", "velocity", "score"] = "simple"
    gamma: float = 5.0
    times: Literal["uniform", "log-normal", "importance", "levels"] = "uniform"
    mean: float = -1.2
    std: float = 1.2
    stratified: bool = True
    unconditional: float = 0.0
    noise_levels: int = 10

    def __post_init__(self) -> None:
        self.weight(None)
        self.sampler()
        check_nonnegative(unconditional=self.unconditional)

    def weight(self, sigma_data: float | None) -> Weighting:
        """The weighting, sigma_data being the model's."""
        if self.weighting == "min-snr":
            return min_snr(self.gamma)
        if self.weighting == "edm":
            return edm() if sigma_data is None else edm(sigma_data)
        plain: dict[str, Callable[[SDE, Tensor], Tensor]] = {
            "simple": simple, "likelihood": likelihood, "bound": discrete_bound(),
        }  # fmt: skip
        return plain[self.weighting] if self.weighting in plain else uniform_in(self.weighting)

    def sampler(self) -> TimeSampler:
        """The distribution of times."""
        if self.times == "log-normal":
            return LogNormalTimes(self.mean, self.std, self.stratified)
        if self.times == "levels":
            return LevelTimes(self.noise_levels, self.stratified)
        return (UniformTimes if self.times == "uniform" else ImportanceTimes)(self.stratified)


@dataclass(frozen=True)
class EvaluateConfig:
    """What is drawn and measured every `train.evaluate_every` steps, and at the end.

    Args:
        grid: images in the picture samples/STEP.png; 0 for none.
        solver, nfe: how they are drawn; a name that `scoresde solvers` lists.
        clip: the posterior mean to [-1, 1].
        seed: of the samples: the same noise every time.
        batch_size: samples that the network takes at once.
        data: real data to compare with, as `--data`; without, no metrics.
        n: samples that the metrics are of.
        metrics: names out of `scoresde.metrics.METRICS`.
        features: of the metrics; see `scoresde evaluate --help`.
    """

    grid: int = 64
    solver: str = "adams"
    nfe: int = 20
    clip: bool = False
    seed: int = 0
    batch_size: int = 64
    data: str | None = None
    n: int = 500
    metrics: tuple[str, ...] = ("frechet",)
    features: str | None = None

    def __post_init__(self) -> None:
        check_count(nfe=self.nfe, batch_size=self.batch_size)
        if self.grid < 0 or self.seed < 0 or self.n < 12:
            raise ValueError(f"grid={self.grid}, seed={self.seed}, n={self.n}: expected grid, seed >= 0 and n >= 12")
        for name in self.metrics:
            check_option(("precision_recall", *METRICS), metrics=name)


SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}


@dataclass(frozen=True)
class InSections:
    """A training run: what `config.toml` says, a section each; a subclass says in `sections` which."""

    sections: ClassVar[Mapping[str, type[Any]]]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From a mapping of mappings.

        Raises:
            ValueError: on a section or key that is not known, one that is missing, or a value of another type or out of
                its range; the message names it.
        """
        check_sections(settings, cls.sections)
        return cls(**{name: section(kind, name, settings.get(name, {})) for name, kind in cls.sections.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """What `of` takes, of TOML's types: None is left out, being every such key's default."""
        found = {name: asdict(getattr(self, name)) for name in self.sections}
        return {name: {k: v for k, v in one.items() if v is not None} for name, one in found.items()}


@dataclass(frozen=True)
class RunConfig(InSections):
    """A training run of a denoiser."""

    sections = SECTIONS

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    loss: LossConfig = field(default_factory=LossConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if self.loss.unconditional and self.data.drop:
            raise ArgumentError(
                f"loss.unconditional={self.loss.unconditional}, data.drop={self.data.drop}: give one of them"
            )
        if self.loss.unconditional and not (self.data.classes or self.data.conditions or self.data.captions):
            raise ArgumentError(f"loss.unconditional={self.loss.unconditional}: there is no condition to leave out")

    @property
    def blind(self) -> bool:
        """Whether the network is told nothing at times."""
        return self.data.drop > 0 or self.loss.unconditional > 0


CATEGORICAL: dict[str, type[Any]] = {"data": DataConfig, "model": CategoricalConfig, "train": TrainConfig}


@dataclass(frozen=True)
class CategoricalRun(InSections):
    """A training run of a denoiser of whole states."""

    sections = CATEGORICAL

    data: DataConfig
    model: CategoricalConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        if self.data.codec is not None or self.data.captions is not None:
            raise ArgumentError("data.codec and data.captions are for models of numbers: leave them out")

    @property
    def blind(self) -> bool:
        """Whether the network is told nothing at times."""
        return self.data.drop > 0


def check_sections(settings: Mapping[str, Any], sections: Mapping[str, type[Any]] = SECTIONS) -> None:
    """Raises ValueError, naming them, if there are sections or keys that are not known."""
    check_keys("the configuration", settings, sections)
    for name, section in settings.items():
        if not isinstance(section, Mapping):
            raise ValueError(f"{name} = {section!r}: expected a section, {name}.KEY = VALUE")
        check_keys(f"section {name!r}", section, (f.name for f in fields(sections[name])))


def section(kind: type[T], name: str, settings: Mapping[str, Any]) -> T:
    """A dataclass from a section, every value of the type that it is declared with: a whole number as a float, a list
    as a tuple. Without msgspec all but lists stay as they are: a run folder's were checked before they were written.

    Raises:
        ValueError: if a key is missing, or a value of another type or out of its range; the message names it.
    """
    try:
        import msgspec
    except ImportError:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        key, _, index = place.rstrip("]`").partition("[")
        if key not in settings:
            kind_of = ArgumentError if isinstance(error.__cause__, ArgumentError) else ValueError
            raise kind_of(f"section {name!r}: {what}") from error
        value, hint = settings[key], get_type_hints(kind)[key]
        given = f"{name}.{key}[{index}] = {value[int(index)]!r}" if index else f"{name}.{key} = {value!r}"
        choices = [get_args(option) for option in (hint, *get_args(hint)) if get_origin(option) is Literal]
        words = one_of(value, choices[0]) if choices else what[0].lower() + what[1:]
        raise ValueError(f"{given}: {words}") from error


# --- TOML ------------------------------------------------------------------------------------------------------------


def check_installed() -> None:
    """Raises ImportError, saying what to install, if what checks and writes configurations is not there."""
    try:
        import msgspec  # noqa: F401
        import tomli_w  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "configurations are checked by msgspec, written by tomli-w: pip install scoresde[train]"
        ) from error


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        ValueError: if it is none; the message names it.
    """
    try:
        settings: dict[str, Any] = parsed(tomllib.loads, path.read_text())
        return settings
    except ValueError as error:  # tomllib's own and UnicodeDecodeError
        raise ValueError(f"{path} is no TOML: {error}") from error


def write_toml(path: Path, settings: Mapping[str, Any]) -> None:
    """Write tables of numbers, texts, lists and tables, whole or not at all.

    Raises:
        TypeError: on another value.
    """
    import tomli_w

    write_whole(path, lambda file: tomli_w.dump(settings, file))


def override(settings: dict[str, Any], changes: Iterable[str]) -> None:
    """Change settings in place by texts SECTION.KEY=VALUE, the value as TOML has it; a word needs no quotes.

    Raises:
        ValueError: if one is not of that form.

    >>> settings = {"train": {"steps": 10}}
    >>> override(settings, ["train.steps=20", "model.sde=ve", "model.options.multipliers=[1, 2]"])
    >>> settings
    {'train': {'steps': 20}, 'model': {'sde': 've', 'options': {'multipliers': [1, 2]}}}
    """
    for change in changes:
        path, equals, text = change.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or len(keys) < 2 or not all(keys):
            raise ValueError(f"--set {change!r}: expected SECTION.KEY=VALUE, train.steps=3000 say")
        place = settings
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {change!r}: {key} is no section")
        place[keys[-1]] = _parsed(change, text.strip())


def _parsed(change: str, text: str) -> Any:
    try:
        found = parsed(tomllib.loads, f"value = {text}")["value"] if "\n" not in text else text
    except ValueError as error:
        if not text or text[0] in "[{\"'":
            raise ValueError(f"--set {change!r}: {text or 'nothing'} is no TOML value ({error})") from error
        return text
    return text if isinstance(found, datetime.date | datetime.time) else found
