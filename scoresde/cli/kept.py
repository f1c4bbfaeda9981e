"""The configuration that a run folder keeps: in config.toml, which is its user's to change, and in every checkpoint,
which says what that was trained with.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from scoresde.cli.config import RunConfig, check_sections, override, read_toml
from scoresde.cli.options import Options
from scoresde.errors import CheckpointError
from scoresde.training.folder import Checkpoint, MismatchError, checkpoints, newest
from scoresde.training.identity import FREE
from scoresde.training.whole_files import weights_file

__all__ = ["CONFIG", "mismatch", "run_settings", "settings_of"]

CONFIG = "config.toml"
_FREE = {"data.download", *(f"train.{name}" for name in FREE)}


class RunOptions(Protocol):
    """The arguments of a command that trains: a folder, data, a file, changes of entries, and flags short for these."""

    @property
    def out(self) -> Path: ...
    @property
    def data(self) -> str | None: ...
    @property
    def config(self) -> Path | None: ...
    @property
    def changes(self) -> list[str]: ...
    @property
    def short(self) -> Options: ...


def settings_of(options: RunOptions, sections: Mapping[str, type[Any]]) -> dict[str, Any]:
    """The configuration that the arguments give: that of the run, if there is one in its folder, then the file's, then
    --set, then the short flags.

    Args:
        options: of the command.
        sections: of such a configuration.

    Raises:
        ValueError: if something is not known, or there are no data.
    """
    settings: dict[str, Any] = {}
    alone = options.config is None and options.data is None
    if checkpoints(options.out) or (alone and (options.out / CONFIG).exists()):
        settings = run_settings(options.out)
    check_sections(settings, sections)
    if options.config is not None:
        check_sections(given := read_toml(options.config), sections)
        settings |= {name: {**settings.get(name, {}), **section} for name, section in given.items()}
    override(settings, options.changes)
    check_sections(settings, sections)
    for name, value in {"data.source": options.data, **options.short.given()}.items():
        if value is None:
            continue
        *path, key = name.split(".")
        place = settings
        for step in path:
            place = place.setdefault(step, {})
        place[key] = int(value) if key == "preset" and value.isdecimal() else value
    if "source" not in settings.get("data", {}):
        raise ValueError(f"give --data, or data.source in --config ({options.out} does not say what a run's were)")
    return settings


def run_settings(folder: Path) -> dict[str, Any]:
    """What the run's config.toml says; where that is missing, empty or no TOML, with a warning, what its newest
    checkpoint was trained with.

    Raises:
        ValueError: if there is no checkpoint either; as `newest`.
    """
    path = folder / CONFIG
    try:
        if found := read_toml(path):
            return found
        why = f"{path} is empty"
    except FileNotFoundError:
        why = f"{path} is missing"
    except ValueError as error:
        why = str(error)
    checkpoint = newest(folder, weights_file(0))
    if checkpoint is None:
        raise ValueError(why)
    warnings.warn(f"{why}: the configuration is that of {checkpoint.path}", stacklevel=2)
    return _settings_of(checkpoint)


def mismatch(error: MismatchError, out: Path, config: RunConfig) -> CheckpointError:
    """What a run that is refused its folder is told: each entry that differs, and how to go on.

    Args:
        error: the refusal.
        out: the folder.
        config: what was asked for.
    """
    found = newest(out, weights_file(0))
    assert found is not None
    theirs = _settings_of(found)
    different = _differences(theirs, config.to_dict())
    what = str(error)
    if different:
        what = f"{out} holds a run of another configuration. " + "; ".join(different)
    way = f"`scoresde train --out {out}` goes on with that run"
    try:
        edited = _differences(theirs, read_toml(out / CONFIG))
    except (OSError, ValueError):
        edited = []
    if edited and found.manifest["settings"] is None:  # of an earlier version: the rest of it is in that file alone
        way = f"with these set back in {out / CONFIG}, {way}"
    elif edited:
        way = f"with {out / CONFIG} removed, {way} (its checkpoint has its own)"
    if not different:
        way = "the configuration is the same: have the data changed?"
    return CheckpointError(f"{what} ({way}; another --out begins another)")


def _settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What it was trained with; of earlier versions the sections model and train alone."""
    manifest = checkpoint.manifest
    if manifest["settings"] is not None:
        return dict(manifest["settings"])
    sections = {"model": manifest["model"] or {}, "train": manifest["config"]}
    return {name: {k: v for k, v in section.items() if v is not None} for name, section in sections.items()}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The entries of their sections that differ and may not, with both values."""
    there = _flat(theirs)
    here = _flat(json.loads(json.dumps({name: ours[name] for name in theirs if name in ours})))
    return [
        f"{key}: {there.get(key, 'nothing')} in the run, {here.get(key, 'nothing')} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key) and not key.startswith("evaluate.") and key not in _FREE
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
