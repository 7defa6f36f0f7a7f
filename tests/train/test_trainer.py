"""Training steps: against the method written out in plain PyTorch, and resumed against uninterrupted."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from torch import nn

from fluxc.data import TokenizedPrompt
from fluxc.errors import TrainingError
from fluxc.kernels.attention.reference import attention
from fluxc.kernels.streaming_attention.reference import streaming_attention
from fluxc.router import LayerRouter, RouterSpec, layer_state
from fluxc.testing import ToyConfig, toy_module
from fluxc.train.batches import logistic_noise, micro_batches, step_samples
from fluxc.train.checkpoint import Checkpoints
from fluxc.train.options import TrainOptions
from fluxc.train.program import soften
from fluxc.train.trainer import Trainer

CONFIG = ToyConfig(windows=(0, 0))
TARGETS = {"kv": 0.3, "local": 0.9}
POOL = 100
OPTIONS = TrainOptions(
    steps=20, batch=4, router_lr=3e-3, multiplier_lr=1e-2, tau_start=3.0, tau_end=0.5, save_every=7, warmup=0.2, seed=5
)
BIAS = torch.tensor([-4.0, -4.5])


def prompts(count=10, length=24):
    rng = random.Random(0)
    made = []
    for index in range(count):
        size, task = length - rng.randrange(3), ("kv", "local")[index % 2]
        made.append(TokenizedPrompt([rng.randrange(32) for _ in range(size)], size - 1 - index % 3, task))
    return made


def trainer(program, options=OPTIONS):
    return Trainer(soften(program, options.straight_through), prompts(), BIAS, TARGETS, options)


@pytest.fixture
def routed(toy_routed):
    return toy_routed(CONFIG)


class PlainMethod(nn.Module):
    """The toy decoder with routers, and the paper's mix, one layer after another."""

    def __init__(self, routers):
        super().__init__()
        self.model, self.routers = toy_module(CONFIG), routers

    def forward(self, batch, noise, tau):
        model, hidden = self.model, self.model.embed(batch.input_ids)
        angles = batch.position_ids.unsqueeze(-1) * model.inv_freq
        table = (angles.cos().unsqueeze(1), angles.sin().unsqueeze(1))
        weights = []
        for index, layer in enumerate(model.layers):
            out, weight = self.attend(index, layer, layer.norm_1(hidden), table, batch, noise, tau)
            weights.append(weight)
            hidden = hidden + layer.attn.o(out.flatten(2))
            inner = layer.norm_2(hidden)
            hidden = hidden + layer.down(torch.nn.functional.silu(layer.gate(inner)) * layer.up(inner))
        rows = batch.logits_at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return model.head(model.norm(hidden.gather(1, rows))), torch.stack(weights)

    def attend(self, index, layer, hidden, table, batch, noise, tau):
        def heads(linear):
            return linear(hidden).unflatten(2, (-1, CONFIG.head_dim)).transpose(1, 2)

        q, k, v = (heads(linear) for linear in (layer.attn.q, layer.attn.k, layer.attn.v))
        logits = self.routers[index](pooled(q, batch.prompt_lens))
        logits = torch.stack([logits[:, 0] + BIAS[index] + noise[index], logits[:, 1]], dim=1)
        weight = torch.softmax(logits / tau, dim=1)[:, 0]
        q, k = rotated(q, *table), rotated(k, *table)
        how = {"scale": CONFIG.head_dim**-0.5, "layer": index}
        mix = weight[:, None, None, None]
        sparse = streaming_attention(q, k, v, sink=2, window=4, **how)
        return mix * attention(q, k, v, **how) + (1 - mix) * sparse, weight


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def pooled(q, prompt_lens):
    rows = []
    for b, n in enumerate(prompt_lens.tolist()):
        rows.append((q[b, :, : min(POOL, n)].mean((0, 1)) + q[b, :, max(0, n - POOL) : n].mean((0, 1))) / 2)
    return torch.stack(rows)


def plain_losses(state, options):
    """The same steps, seeds and data with the objective written out; loss of each step and the final multipliers."""
    routers = nn.ModuleList(LayerRouter(RouterSpec(CONFIG.head_dim, POOL)) for _ in range(2))
    for index, router in enumerate(routers):
        router.load_state_dict(layer_state(state, index))
    method = PlainMethod(routers)
    method.model.requires_grad_(False)
    price = torch.full((2, 2), options.multiplier_start, requires_grad=True)
    matrices = [p for p in routers.parameters() if p.dim() > 1]
    biases = [p for p in routers.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=options.router_lr, betas=(0.9, 0.95))
    ascent = torch.optim.AdamW([price], lr=options.multiplier_lr, betas=(0.9, 0.95), weight_decay=0.0, maximize=True)
    warm, losses = round(options.warmup * options.steps), []
    for step in range(options.steps):
        rise = step / warm
        fall = 0.5 * (1 + math.cos(math.pi * (step - warm) / (options.steps - warm)))
        scale = rise if step < warm else fall
        for optimizer, lr in ((adam, options.router_lr), (ascent, options.multiplier_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        (part,) = micro_batches(step_samples(prompts(), step, options.batch, options.seed), 10**6)
        noise = logistic_noise(part.samples, 2, step, options.seed)
        logits, weights = method(part.inputs, noise, options.tau(step))
        loss = torch.zeros(())
        for row, sample in enumerate(part.samples):
            size = sample.prompt.answer_len
            loss = loss + nn.functional.cross_entropy(logits[row, :size], part.targets[row, :size]) / options.batch
        for number, (task, target) in enumerate(TARGETS.items()):
            rows = [row for row, sample in enumerate(part.samples) if sample.prompt.task == task]
            if rows:
                gap = (1 - weights[:, rows]).mean() - target
                term = price[number, 0] * gap.abs() + price[number, 1] * gap**2
                loss = loss + term * len(rows) / options.batch
        losses.append(loss.item())
        adam.zero_grad()
        ascent.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(routers.parameters(), options.clip)
        adam.step()
        ascent.step()
        price.data.clamp_(min=0)
    return losses, price.detach()


def test_agrees_with_plain_pytorch_over_twenty_steps(routed):
    expected, price = plain_losses(routed.state_dict, OPTIONS)
    mine = trainer(routed)
    losses = [mine.run_step().loss for _ in range(OPTIONS.steps)]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
    torch.testing.assert_close(mine.multipliers.values.detach(), price)
    assert len({round(loss, 4) for loss in losses}) > 10


def test_targets_are_reached(routed):
    options = dataclasses.replace(OPTIONS, steps=150, multiplier_start=3.0, router_lr=1e-2, multiplier_lr=5e-2)
    mine = trainer(routed, options)
    records = [mine.run_step() for _ in range(options.steps)]
    for task, target in TARGETS.items():
        late = [record.tasks[task].omega for record in records[-20:] if task in record.tasks]
        early = [record.tasks[task].omega for record in records[:10] if task in record.tasks]
        gaps = [abs(sum(omega) / len(omega) - target) for omega in (early, late)]
        assert gaps[1] < max(0.15, gaps[0] / 2)


def test_only_routers_change(routed):
    before = {name: tensor.detach().clone() for name, tensor in routed.state_dict.items()}
    mine = trainer(routed)
    for _ in range(3):
        mine.run_step()
    assert all(torch.equal(routed.state_dict[name], tensor) for name, tensor in before.items())
    trained = mine.program.trained()
    assert any(not torch.equal(trained[name], before[name]) for name in trained)


def test_micro_batches_add_up(routed):
    """Answer loss and Ω of a step do not depend on how it is cut; here its first step, from equal weights."""
    whole, cut = trainer(routed).run_step(), trainer(routed, dataclasses.replace(OPTIONS, micro_tokens=30)).run_step()
    assert abs(whole.lm - cut.lm) < 1e-5
    assert abs(whole.omega - cut.omega) < 1e-6
    assert {name: task.prompts for name, task in whole.tasks.items()} == {
        name: task.prompts for name, task in cut.tasks.items()
    }
    assert cut.padding == 0.0


def test_distilling_alone_is_zero_at_dense(routed):
    options = dataclasses.replace(OPTIONS, distill=1.0, multiplier_start=0.0)
    mine = Trainer(soften(routed), prompts(), torch.full((2,), torch.inf), TARGETS, options)
    assert abs(mine.run_step().loss) < 1e-6


def checkpoints(folder, **run):
    return Checkpoints(folder, {"model": "m", "options": "o", "data": "d"} | run)


@pytest.mark.parametrize("straight_through", [False, True])
def test_resumed_equals_uninterrupted(routed, tmp_path, straight_through):
    options = dataclasses.replace(OPTIONS, straight_through=straight_through)
    whole = trainer(routed, options)
    records = [whole.run_step() for _ in range(20)]
    first = trainer(routed, options)
    for _ in range(9):
        first.run_step()
    checkpoints(tmp_path).save(first)
    second = trainer(routed, options)
    assert checkpoints(tmp_path).restore(second) == 9
    assert [second.run_step() for _ in range(11)] == records[9:]
    mine, expected = second.program.trained(), whole.program.trained()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert torch.equal(second.multipliers.values, whole.multipliers.values)


def test_one_checkpoint_is_kept(routed, tmp_path):
    mine = trainer(routed)
    for _ in range(3):
        mine.run_step()
        checkpoints(tmp_path).save(mine)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    assert {path.suffix for path in (tmp_path / "step-000003").iterdir()} == {".json", ".safetensors"}


def test_checkpoint_of_another_run_is_refused(routed, tmp_path):
    mine = trainer(routed)
    mine.run_step()
    checkpoints(tmp_path).save(mine)
    with pytest.raises(TrainingError, match="belongs to another model and another data"):
        checkpoints(tmp_path, model="x", data="y").restore(trainer(routed))
    (tmp_path / "step-000001" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingError, match="cannot be read"):
        checkpoints(tmp_path).restore(trainer(routed))


def test_a_loss_that_is_not_finite_stops_and_changes_nothing(routed):
    mine = trainer(routed)
    with torch.no_grad():
        mine.multipliers.values.fill_(torch.nan)
    before = mine.program.trained()
    with pytest.raises(TrainingError, match=r"the loss is nan .* in step 1"):
        mine.run_step()
    assert mine.step == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in mine.program.trained().items())
