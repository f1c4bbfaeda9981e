"""Stand-in writers of what other toolkits leave, for tests and benchmarks/interop.py: by what the
formats are, without those toolkits.
"""

import contextlib
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch
from textbook_song import in_order

# ---- EDM: torch_utils.persistence ----


class Persistent:
    def __init__(self, kind, state):
        self.kind, self.state = kind, state

    def __reduce__(self):
        made = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        source = "import os; os.abort()"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.kind, "state": self.state}
        return made, (meta,)


class EasyDict(dict):
    """dnnlib's."""

    __module__ = "dnnlib.util"


@contextlib.contextmanager
def persistence():
    """Modules of the names that EDM's pickles have, while they are written."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    modules = {name: types.ModuleType(name) for name in names}

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("it was run")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def write_edm(path, held, protocol=4):
    """Objects as EDM's training writes them."""
    with persistence():
        path.write_bytes(pickle.dumps(held, protocol=protocol))
    return path


def module(kind, tensors, **attributes):
    """The tree of modules whose tensors have these names."""
    children, own = {}, {}
    for name, tensor in tensors.items():
        head, dot, rest = name.partition(".")
        if dot:
            children.setdefault(head, {})[rest] = tensor
        else:
            own[name] = tensor
    buffers = {n: t for n, t in own.items() if n in ("freqs", "resample_filter", "u")}
    modules = OrderedDict((n, module({"model": attributes.get("network")}.get(n, n), t)) for n, t in children.items())
    parameters = OrderedDict((n, torch.nn.Parameter(t)) for n, t in own.items() if n not in buffers)
    parameters["unused"] = None
    state = {"training": False, "_parameters": parameters, "_buffers": OrderedDict(buffers), "_modules": modules}
    if kind in ("enc", "dec"):
        container = torch.nn.ModuleDict()
        container.__dict__.update(state)
        return container
    state |= {"_non_persistent_buffers_set": set(), "skip_scale": np.sqrt(0.5), **attributes}
    return Persistent(kind, state)


def snapshot(kind, options, p, network=None, **attributes):
    """What their training saves."""
    network = network or ("SongUNet" if "embedding_type" in options else "DhariwalUNet")
    u = {"u": attributes.pop("u")} if "u" in attributes else {}
    whole = module(kind, {**{f"model.{name}": t for name, t in p.items()}, **u}, network=network, **attributes)
    whole.state["_modules"]["model"].state |= {"_init_args": (), "_init_kwargs": EasyDict(options)}
    return {"ema": whole, "dataset_kwargs": {"path": "data.zip"}, "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2})}


# ---- score_sde ----


def write_score_sde(path, p, ema=True):
    """What save_checkpoint writes: the averages are the tensors of p, the parameters themselves other numbers."""
    tensors = list(in_order(p))
    fixed = [n for n, _ in tensors if n == "all_modules.0.W" and tensors[0][1].dim() == 1]
    state = {f"module.{n}": t if n in fixed or not ema else t + 1 for n, t in tensors}
    held = {"optimizer": {"state": {}, "param_groups": []}, "step": 5}
    held["model"] = {"module.sigmas": torch.ones(7), **state}
    if ema:
        held["ema"] = {"decay": 0.999, "num_updates": 3, "shadow_params": [t for n, t in tensors if n not in fixed]}
    torch.save(held, path)
    return path
