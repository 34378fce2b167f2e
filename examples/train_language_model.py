"""Train a small Llama twice, with the ordinary loss and with fusedloss, and compare the two runs.

    python examples/train_language_model.py            # or: make demo

Same initial weights, same batches, same optimiser; the loss function is the only difference (see `LOSSES`).
Prints a table and writes a figure with both loss curves and both memory profiles.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from corpus import VOCABULARY, Corpus, batches, load_corpus
from memory import SUPPORTED as MEMORY_SUPPORTED
from memory import MemoryTrace
from report import Run, Step, draw, table
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import fusedloss

# (hidden states (B, T, D), output layer's weight (V, D), labels (B, T)) -> loss
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

ROWS, LENGTH = 16, 256  # a batch: 4,096 tokens
HIDDEN = 256
HELD_OUT_BATCHES = 2
PEAK_LEARNING_RATE = 4e-3
PROFILED = (0.4, 0.6, 0.8)  # the steps, as shares of the run, whose memory is sampled


def ordinary_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What transformers' models do: all the scores, widened to fp32, then cross-entropy."""
    scores = F.linear(hidden, weight)
    return F.cross_entropy(scores.float().flatten(0, -2), labels.flatten())


def fused_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The swap: one line, and the scores are never stored."""
    return fusedloss.linear_cross_entropy(hidden, weight, labels)


LOSSES: dict[str, LossFunction] = {"ordinary": ordinary_loss, "fused": fused_loss}


def build_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 19.5 million parameters, randomly initialised, its output layer not tied to the embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            initializer_range=HIDDEN**-0.5,  # the usual 0.02 is for wider models: this one would learn much later
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def build_optimizer(
    model: LlamaForCausalLM, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with weight decay on matrices only, linear warm-up, and cosine decay to a tenth."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm_up = max(1, steps // 8)

    def rate(step: int) -> float:
        done = max(0, step - warm_up) / max(1, steps - warm_up)
        return min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * done))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    loss_function: LossFunction,
    tokens: Tensor,
    dtype: torch.dtype,
    trace: MemoryTrace | None,
) -> Step:
    """One step of training, with the times at which it and its loss step began and ended."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    started = perf_counter()

    with autocast:
        hidden = model.model(inputs).last_hidden_state

    # Cut at the hidden states, the loss step stands alone: scores, loss, and the gradients of hidden states and
    # weight. The sums are those of one `loss.backward()` through the whole model.
    top = hidden.detach().requires_grad_()
    if trace is not None:  # with no scratch memory of an earlier step: it is counted
        fusedloss.set_workspace_limit(0)
        trace.settle()
    loss_started = perf_counter()
    with autocast:
        loss = loss_function(top, model.lm_head.weight, labels)
    loss.backward()
    loss_ended = perf_counter()

    hidden.backward(top.grad)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    fusedloss.set_workspace_limit(fusedloss.memory.WORKSPACE_LIMIT)
    return Step(loss.item(), started, loss_started, loss_ended, ended=perf_counter(), trace=trace)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, loss_function: LossFunction, tokens: Tensor, dtype: torch.dtype) -> float:
    """Mean loss on a few batches from files that training never saw."""
    data = batches(tokens, ROWS, LENGTH + 1, seed=0)
    losses = []
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        for _, batch in zip(range(HELD_OUT_BATCHES), data):
            hidden = model.model(batch[:, :-1]).last_hidden_state
            losses.append(loss_function(hidden, model.lm_head.weight, batch[:, 1:]).item())
    return sum(losses) / len(losses)


def train(name: str, corpus: Corpus, steps: int, seed: int, dtype: torch.dtype) -> Run:
    """A whole run: `steps` steps from the seed's initial weights, over the seed's batches."""
    loss_function = LOSSES[name]
    model = build_model(seed)
    optimizer, scheduler = build_optimizer(model, steps)
    data = batches(corpus.train, ROWS, LENGTH + 1, seed)
    profiled = {max(1, int(share * steps)) for share in PROFILED} if MEMORY_SUPPORTED else set()

    run = Run(name, tokens_per_step=ROWS * LENGTH)
    progress = tqdm(range(steps), desc=f"{name:>8}", unit="step", mininterval=0.5)
    for index in progress:
        with MemoryTrace() if index in profiled else nullcontext() as trace:
            step = train_step(model, optimizer, loss_function, next(data), dtype, trace)
        scheduler.step()
        run.steps.append(step)
        progress.set_postfix(loss=f"{step.loss:.3f}", refresh=False)

    run.held_out = held_out_loss(model, loss_function, corpus.held_out, dtype)
    return run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three steps of each run: does it still work?")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: under autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads for PyTorch (default: PyTorch's own choice)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="folder of the figure (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.quick:
        options.steps = 3
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    return options


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)

    print("reading the standard library's sources and training a tokenizer on them ...", flush=True)
    corpus = load_corpus(options.seed)
    print(
        f"{corpus.files:,} files, {corpus.characters / 1e6:.1f} million characters, "
        f"{len(corpus.train) / 1e6:.1f} million training tokens, vocabulary {VOCABULARY:,}"
    )

    runs = []
    for name in LOSSES:
        runs.append(train(name, corpus, options.steps, options.seed, dtype))
        gc.collect()  # the second run must not find the first one's model in memory

    ordinary, fused = runs
    print(table(ordinary, fused, threads=torch.get_num_threads(), dtype=options.dtype))
    options.out.mkdir(parents=True, exist_ok=True)
    figure = options.out / "train_language_model.png"
    draw(ordinary, fused, figure)
    print(f"\nfigure: {os.path.relpath(figure)}")


if __name__ == "__main__":
    main()
