"""Draft heads for the demo model, in the files of Medusa's second version.

The `lm_head` of the base reads the hidden state h of a position and predicts the next token. Head i predicts the token
at distance 2 + i: the same `lm_head` reads h + SiLU(W_i h + b_i). The decoder and its LoRA are not trained, so a head
can only use information that h already contains. For *upper*, this limits the accuracy: head 0 was right 42% of the
time, a perceptron 1,024 wide in its place 43%.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_checkpoint import BASE_NAME, IGNORED
from demo_descent import descend
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

NUM_HEADS = 4
STEPS = 2500
RATE = 0.03
POSITIONS_PER_STEP = 2048
DECAY = 0.8  # of loss weights from head to head: a candidate counts only if all before it were right
CONFIG_FILE = "config.json"
TENSOR_FILE = "medusa_lm_head.safetensors"

Batch = tuple[torch.Tensor, torch.Tensor]  # input ids and labels, both [B, T] int64
Heads = torch.nn.ModuleList


class Block(torch.nn.Module):
    """x + SiLU(W x + b). It starts as the identity, so that each head at first predicts the next token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(hidden_size, hidden_size)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.linear(x))


def new_heads(hidden_size: int) -> Heads:
    """Return heads of one layer each, with the parameter names of Medusa's files: `{head}.{layer}.linear.weight`."""
    return Heads(torch.nn.Sequential(Block(hidden_size)) for _ in range(NUM_HEADS))


@torch.no_grad()
def read_positions(model: LlamaForCausalLM, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed hidden states [N, hidden] that answers are predicted from, and the heads' targets [N, heads].

    A target beyond `<|end|>` is `IGNORED`.
    """
    states, targets = list[torch.Tensor](), list[torch.Tensor]()
    for ids, labels in batches:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        asked = labels[:, 1:] != IGNORED
        beyond = F.pad(labels, (0, NUM_HEADS), value=IGNORED)
        width = hidden.shape[1]
        states.append(hidden[asked])
        targets.append(torch.stack([beyond[:, 2 + i : 2 + i + width][asked] for i in range(NUM_HEADS)], dim=1))
    return torch.cat(states), torch.cat(targets)


def train_heads(label: str, model: LlamaForCausalLM, batches: Iterable[Batch], seed: int) -> Heads:
    """Train heads for `model`. The decoder reads each batch once; the heads are then trained on its hidden states."""
    states, targets = read_positions(model, batches)
    reader = model.lm_head.weight.detach()
    heads = new_heads(states.shape[1])
    matrices, biases = ([p for p in heads.parameters() if p.ndim == ndim] for ndim in (2, 1))
    optimizers: list[torch.optim.Optimizer] = [  # AdamW alone needs four times the steps for the same accuracy
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(biases, lr=RATE, weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS) for o in optimizers]
    generator = torch.Generator().manual_seed(seed)

    def loss_at(_: int) -> torch.Tensor:
        drawn = torch.randint(len(states), (POSITIONS_PER_STEP,), generator=generator)
        hidden, right = states[drawn], targets[drawn]
        loss = torch.zeros(())
        for i, head in enumerate(heads):
            loss = loss + DECAY**i * F.cross_entropy(head(hidden) @ reader.T, right[:, i], ignore_index=IGNORED)
        return loss

    descend(f"{label} heads", optimizers, schedules, loss_at, steps=STEPS, report_every=500)
    return heads


@torch.no_grad()
def measure_heads(model: LlamaForCausalLM, heads: Heads, batches: Iterable[Batch]) -> list[dict[str, float]]:
    """Return for each head the accuracy of its first candidate, and of its first three, on the right answers."""
    states, targets = read_positions(model, batches)
    results = []
    for i, head in enumerate(heads):
        known = targets[:, i] != IGNORED
        guesses = model.lm_head(head(states[known])).topk(3).indices
        hits = guesses == targets[known, i, None]
        top_1, top_3 = hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
        results.append({"top_1": round(top_1, 4), "top_3": round(top_3, 4)})
    return results


def save_heads(heads: Heads, folder: Path) -> None:
    """Write the config and the tensors of Medusa's second version.

    The tensors are float16: no value is above 6, so the range of bfloat16 is not needed and would cost three bits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "base_model_name_or_path": BASE_NAME,
        "medusa_num_heads": NUM_HEADS,
        "medusa_num_layers": 1,
        "version": 2,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: p.detach().to(torch.float16).contiguous() for name, p in heads.state_dict().items()}
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    (folder / TENSOR_FILE).chmod(0o644)


def load_heads(folder: Path) -> Heads:
    """Return the saved heads, in float32."""
    tensors = load_file(folder / TENSOR_FILE)
    heads = new_heads(tensors["0.0.linear.bias"].numel())
    heads.load_state_dict(tensors)
    return heads
