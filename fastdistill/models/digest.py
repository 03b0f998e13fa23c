"""Digests of a pipeline's parts by their content: two copies of a model have one digest, wherever
they lie."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

NOT_CONTENT = ("transformers_version",)
"""Fields of a config, besides those with an underscore, that say where a part comes from."""

Mark = tuple[tuple[int, int], ...]
"""Address and version of each tensor of a module; torch counts what is written in place."""

_known: WeakKeyDictionary[nn.Module, tuple[Mark, str]] = WeakKeyDictionary()


def digests(pipeline: Any) -> dict[str, str]:
    """Digest of each part of a diffusers pipeline, by the name of the part."""
    return {name: digest_of(part) for name, part in pipeline.components.items() if part is not None}


def digest_of(part: Any) -> str:
    """Digest of a network, a scheduler, a tokenizer, or another part with a config.

    A network's digest covers its class, its config, and name, dtype, shape and bytes of each tensor
    that a state dict holds, quantised ones too. It is equal on every device. Tensors are read once
    in a process, until they change; a change through `.data` that keeps the memory is not seen.
    """
    facts: dict[str, Any] = {"class": type(part).__name__, "config": _config(part)}
    if isinstance(part, nn.Module):
        facts["weights"] = _weights(part)
    elif hasattr(part, "get_vocab"):
        facts["tokenizer"] = _tokenizer(part)
    return _hash(json.dumps(facts, sort_keys=True, default=_text).encode())


def _config(part: Any) -> dict[str, Any]:
    config: Any = getattr(part, "config", {})
    fields: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else config
    return {name: value for name, value in fields.items() if not name.startswith("_") and name not in NOT_CONTENT}


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # The last call has left its own there.
    for setting in ("truncation", "padding"):
        rules.pop(setting, None)
    return {
        "rules": rules,
        "length": tokenizer.model_max_length,
        "side": tokenizer.padding_side,
        "special": tokenizer.special_tokens_map,
    }


def _weights(module: nn.Module) -> str:
    tensors = dict(_leaves(module.state_dict(keep_vars=True)))
    mark = _mark(tensors.values())
    if module in _known and mark is not None and _known[module][0] == mark:
        return _known[module][1]
    # hashlib lets other threads run while it reads.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = _hash("".join(pool.map(_hash_of, sorted(tensors), map(tensors.get, sorted(tensors)))).encode())
    if mark is not None:
        _known[module] = mark, found
    return found


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Plain tensors, and whatever else a state dict may hold; a quantised tensor is several."""
    for name, value in values.items():
        if hasattr(value, "__tensor_flatten__"):
            inner, context = value.__tensor_flatten__()
            yield f"{name}({type(value).__name__})", _text(context)
            yield from _leaves({f"{name}.{part}": getattr(value, part) for part in inner})
        else:
            yield name, value


def _mark(values: Any) -> Mark | None:
    """Addresses and versions of tensors; None where torch counts no versions."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def _hash_of(name: str, value: Any) -> str:
    if not isinstance(value, Tensor):
        return _hash(f"{name} {_text(value)}".encode())
    # Classes of quantised tensors have their own view of what follows.
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        kind = f"{name} {value.dtype} {tuple(value.shape)} {getattr(value, 'quant_type', '')}"
        found = hashlib.sha256(kind.encode())
        if not value.is_meta:
            # A single element may have any stride.
            flat = value.detach().cpu().contiguous().as_strided((value.numel(),), (1,))
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _text(value: Any) -> str:
    """Text of any value, without its address in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
