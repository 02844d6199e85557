"""Answers requests with Transformers and PEFT, as their users do: left-padded batches, an adapter name per row.

Started by `peft_process`. Reads requests from standard input and writes answers to standard output, one per line.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from typing import Any

import msgspec
import torch
from peft import PeftModel
from peft_process import Answered, Ask, Load
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

PAD = 0
BASE = "__base__"  # PEFT's name for a row without an adapter


class Clock(StoppingCriteria):
    """A stopping criterion that records the time of each step and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Contestant:
    """A plain model for requests without adapters, and a second one with PEFT's layers."""

    def __init__(self, load: Load) -> None:
        self._plain = _load_model(load)
        self._adapted = _load_adapted(load) if load.adapters else None

    @torch.inference_mode()
    def answer(self, ask: Ask) -> Answered:
        """Answer all requests, one batch after the other."""
        # Rows of one adapter beside each other: the fewer names a batch has, the faster PEFT is.
        order = sorted(range(len(ask.prompts)), key=lambda i: ask.adapters[i] or "")
        token_ids: list[list[int]] = [[] for _ in order]
        decode_s, num_decoded = 0.0, 0
        started_s = time.perf_counter()
        for start in range(0, len(order), ask.batch_size):
            rows = order[start : start + ask.batch_size]
            clock = Clock()
            for row, output in zip(rows, self._generate(ask, rows, clock), strict=True):
                token_ids[row] = output
            decode_s += clock.times[-1] - clock.times[0]
            num_decoded += len(rows) * (ask.new_tokens - 1)
        seconds = time.perf_counter() - started_s
        return Answered(token_ids, seconds, num_decoded / decode_s if num_decoded else None)

    def _generate(self, ask: Ask, rows: list[int], clock: Clock) -> list[list[int]]:
        prompts = [ask.prompts[row] for row in rows]
        width = max(map(len, prompts))
        options: dict[str, Any] = {
            "input_ids": torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            "do_sample": False,
            "max_new_tokens": ask.new_tokens,  # no answer ends before: the model has no end token
            "pad_token_id": PAD,
            "stopping_criteria": StoppingCriteriaList([clock]),
        }
        names = [ask.adapters[row] or BASE for row in rows]
        if set(names) == {BASE}:
            output = self._plain.generate(**options)
        elif len(set(names)) == 1:  # no mix of adapters: PEFT's ordinary path is faster
            assert self._adapted is not None
            self._adapted.set_adapter(names[0])
            output = self._adapted.generate(**options)
        else:
            assert self._adapted is not None
            output = self._adapted.generate(**options, adapter_names=names)
        return output[:, width:].tolist()


def _load_model(load: Load) -> Any:
    model = AutoModelForCausalLM.from_pretrained(load.model, dtype=getattr(torch, load.dtype))
    return model.eval()


def _load_adapted(load: Load) -> PeftModel:
    names = iter(load.adapters.items())
    name, path = next(names)
    # Adapters in the model's dtype, as with Descant; by default PEFT makes them float32.
    model = PeftModel.from_pretrained(_load_model(load), path, adapter_name=name, autocast_adapter_dtype=False)
    for name, path in names:
        model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert dtypes == {getattr(torch, load.dtype)}, f"PEFT has {dtypes}"
    return model.eval()


def main() -> None:
    """Answer until the end of the input."""
    torch.set_num_threads(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    contestant = None
    for line in sys.stdin.buffer:
        match msgspec.json.decode(line, type=Load | Ask):
            case Load() as load:
                contestant = None
                gc.collect()
                contestant = Contestant(load)
                answers.write(b"\n")
            case Ask() as ask:
                assert contestant is not None, "nothing is loaded"
                answers.write(msgspec.json.encode(contestant.answer(ask)) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
