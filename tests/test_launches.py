"""What a step of SO costs a GPU, told without one: launches by count, waits for the device, addresses, draws."""

import copy
from argparse import Namespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.replay import Recorded
from torch import nn

import clip
from benchmarks import launches
from clip.layouts import PackedPrompts
from clip.model import CLIP, Architecture
from methods.choice import Blocks, select_matrices
from optimizers import SO, SparseOptimizer, attach

SMALL = Architecture(
    32, 32, 128, 2, 8, context_length=77, vocab_size=49408, text_width=64, text_layers=2
)  # embeddings of 32, images of 32 pixels


@pytest.fixture(scope="module")
def counted():
    args = Namespace(backbone="ViT-B/16", batch_size=2, classes=47, precision="bf16", device="cpu")
    return {name: launches.count(own, args) for name, own in launches.SIDES.items()}


def test_a_step_of_so_has_at_most_1500_launches_and_no_more_than_lora(counted):
    totals = {name: sum(own.totals.values()) for name, own in counted.items()}
    assert totals["so"] <= 1500 and totals["so"] <= totals["lora"]
    assert all(own.totals[part] for own in counted.values() for part in launches.PARTS)


def test_one_write_changes_all_weights_and_nothing_scatters(counted):
    """On a GPU each of these sorts in deterministic mode: one for the weights, one for their 16-bit copies."""
    names = sum((own for own in counted["so"].counts.values()), start=launches.Counter())
    assert names["index_put_"] == 2
    assert not {"scatter_", "index_copy", "index_copy_", "index_put", "index_add_", "nonzero"} & names.keys()


def trained(device="cpu", T=2, **options):
    """Return a small CLIP, SO attached to it, and a step on a batch of noise."""
    torch.manual_seed(0)
    model = CLIP(SMALL).to(device)
    optimizer = SO(select_matrices(model, Blocks()).values(), lr=1e-3, density_ratio=0.002, T=T, **options)
    attached = attach(model, optimizer, dense_above=1)
    prompts = PackedPrompts(clip.tokenize(["a photo of a cat.", "a photo of a small dog."])).to(device)

    def step():
        images, labels = torch.randn(3, 3, 32, 32).to(device), torch.tensor([0, 1, 1], device=device)
        with torch.autocast("cpu", torch.bfloat16):
            image, text = model.encode_image(images), model.encode_text(prompts)
        F.cross_entropy(image.float() @ text.float().T, labels).backward()
        optimizer.step()

    return model, optimizer, attached, step


def test_no_step_waits_for_the_device():
    """On `meta` all that reads a value raises: four steps, two of them with draws."""
    *_, step = trained("meta")
    for _ in range(4):
        step()


def test_nothing_moves_in_memory():
    model, optimizer, attached, step = trained()
    step()

    def addresses():
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        tensors += [*model.parameters(), *(t for t, _ in attached.casts.values()), *optimizer.leaves.values()]
        tensors += [t for *_, place in attached.places.values() for t in place if t is not None]
        return [t.data_ptr() for t in tensors]

    first = addresses()
    assert len(first) > 100
    for _ in range(3 * 2):
        step()
        assert addresses() == first


# --- memory that weights share


def test_weights_in_one_memory_are_saved_copied_loaded_and_moved(tmp_path):
    model, _, _, step = trained()
    weights = list(select_matrices(model, Blocks()).values())
    assert len({p.untyped_storage().data_ptr() for p in weights}) == 1
    before = {name: t.clone() for name, t in model.state_dict().items()}
    versions = [p._version for p in weights]
    step()
    assert all(p._version > version for p, version in zip(weights, versions))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert all(
        torch.equal(t, model.state_dict()[name]) for name, t in load_file(tmp_path / "model.safetensors").items()
    )
    duplicate = copy.deepcopy(model)
    model.load_state_dict(before)
    step()
    assert not torch.equal(
        model.transformer.resblocks[0].mlp.c_fc.weight, before["transformer.resblocks.0.mlp.c_fc.weight"]
    )
    assert any(not torch.equal(t, before[name]) for name, t in duplicate.state_dict().items())


def test_weights_that_were_moved_apart_are_trained_the_same():
    (model, _, _, step), (other, _, attached, other_step) = trained(), trained()
    for p in other.parameters():
        p.data = p.data.clone()
    for _ in range(5):
        for each in (step, other_step):
            torch.manual_seed(1)
            each()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
        assert all(torch.equal(t, p.bfloat16()) for p, (t, version) in attached.casts.items() if version == p._version)


def test_a_step_that_fails_leaves_nothing_behind(monkeypatch):
    """As Ctrl-C in a notebook, and lack of memory: the next step has its own learning rate and its own parameters."""
    params = [nn.Parameter(torch.ones(30)) for _ in range(2)]
    optimizer = SO(params, lr=0.1, density_ratio=0.5)
    params[1].grad = torch.ones(30)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(optimizer, "_subtract", mock.Mock(side_effect=KeyboardInterrupt))
        optimizer.step()
    params[0].grad = torch.ones(30)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, torch.ones(30)) for p in params)
    optimizer.advance(optimizer.batches())
    with pytest.raises(RuntimeError, match="state"):
        optimizer.state_dict()
    params[0].grad = None
    with pytest.raises(RuntimeError, match="other parameters"):
        optimizer.step()


def test_a_layer_that_is_trained_no_more_is_left_alone():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    optimizer = SO(model.parameters(), density_ratio=0.1, T=2)
    attach(model, optimizer, dense_above=1)
    fresh = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        model(torch.ones(1, 9)).sum().backward()
        optimizer.step()
    model[1].requires_grad_(False)
    optimizer.load_state_dict(fresh)
    before = model[0].weight.clone()
    model(torch.ones(1, 9)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("shape", [(), (1,), (7, 3)])
@pytest.mark.parametrize("dense", [False, True])
def test_corrections_in_tensors_are_those_in_numbers(shape, dense):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for _ in range(2)]
    params[1].data.copy_(params[0])
    both = [of([p], lr=0.1, dense=dense, density_ratio=0.5) for of, p in zip((SO, SparseOptimizer.SO), params)]
    for _ in range(200):
        params[0].grad = torch.randn(shape)
        params[1].grad = params[0].grad.clone()
        for optimizer in both:
            optimizer.step()
        assert torch.equal(*params)


# --- draws


def draws(numels, k_of, times):
    """Draw one after the other, as the definition reads."""
    generator = torch.Generator().manual_seed(7)
    return [[SparseOptimizer.draw_support(n, k_of(n), generator) for n in numels] for _ in range(times)]


@pytest.mark.parametrize("T", [1, 3, 5])
def test_draws_made_ahead_are_the_same(T):
    params = [nn.Parameter(torch.zeros(n)) for n in (400, 90, 1000, 50, 7)]
    optimizer = SO(params, density_ratio=0.1, T=T, seed=7)
    expected = draws([p.numel() for p in params], lambda n: max(1, n // 10), times=4)
    for step in range(4 * T):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all(torch.equal(optimizer.state[p]["support"], s) for p, s in zip(params, expected[step // T]))
        if step % T < T - 1:
            due = -(-(step % T + 1) * len(params) // T)
            assert len(optimizer.ahead) <= due
    assert len(optimizer.ahead) == len(params)


def test_a_draw_made_ahead_for_something_else_is_undone():
    """The density changes, and a tensor is frozen, after draws ahead: they are as without them."""

    def run(ahead):
        params = [nn.Parameter(torch.zeros(n)) for n in (400, 90, 1000)]
        optimizer, seen = SO(params, density_ratio=0.1, T=2, seed=7), []
        if not ahead:
            optimizer._draw_ahead = lambda: None
        for step in range(10):
            if step == 4:
                optimizer.param_groups[0]["density_ratio"] = 0.05
            if step == 6:
                params[0].requires_grad_(False)
            for p in params:
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step()
            seen.append([optimizer.state[p]["support"].tolist() for p in params])
            if step == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return seen

    assert run(ahead=True) == run(ahead=False)


def test_repeats_among_the_first_draws_are_replaced():
    """Both ways to draw beside the slow definition: the first k different numbers, in order."""
    for seed in range(20):
        for numel, k in ((10**6, 20), (100, 24)):
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(numel, (k + k // 4 + 8,), generator=generator).tolist()
            different = list(dict.fromkeys(drawn))
            while len(different) < k:
                more = torch.randint(numel, (k + k // 4 + 8 - len(different),), generator=generator).tolist()
                different = list(dict.fromkeys(different + more))
            again = torch.Generator().manual_seed(seed)
            assert SparseOptimizer.draw_support(numel, k, again).tolist() == sorted(different[:k])
            assert torch.equal(again.get_state(), generator.get_state())


# --- gradients of small leaf tensors


def test_gradscaler_unscales_and_skips():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
    scaled = copy.deepcopy(plain)
    optimizers = [SO(net.parameters(), lr=0.01, density_ratio=0.05, T=2) for net in (plain, scaled)]
    for net, optimizer in zip((plain, scaled), optimizers):
        attach(net, optimizer, dense_above=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(8):
        x = torch.randn(5, 30)
        plain(x).square().sum().backward()
        optimizers[0].step()
        if step in (2, 5):  # an update that overflows changes nothing, and is made again
            before = copy.deepcopy((scaled.state_dict(), optimizers[1].state_dict()))
            scaler.scale(scaled(torch.full_like(x, torch.inf)).sum()).backward()
            scaler.step(optimizers[1])
            scaler.update(1024.0)
            assert all(torch.equal(t, before[0][name]) for name, t in scaled.state_dict().items())
            after = optimizers[1].state_dict()["state"]
            for index, state in before[1]["state"].items():
                assert all(str(after[index][name]) == str(state[name]) for name in ("step", "kept", "m", "v"))
            optimizers[1].zero_grad()
        scaler.scale(scaled(x).square().sum()).backward()
        scaler.step(optimizers[1])
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), scaled.parameters()))


def test_clipping_and_hooks_see_the_gradients():
    layer = nn.Linear(30, 40, bias=False)
    optimizer = SO(layer.parameters(), density_ratio=0.05, T=2)
    attach(layer, optimizer, dense_above=1)
    layer(torch.ones(1, 30)).sum().backward()
    leaf = optimizer.leaves[layer.weight]
    assert leaf.grad.tolist() == [1.0] * 60 and layer.weight.grad is None
    seen = []
    leaf.register_hook(lambda grad: seen.append(grad.tolist()))
    layer(torch.ones(1, 30)).sum().backward()
    assert seen == [[1.0] * 60] and leaf.grad.tolist() == [2.0] * 60
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    assert norm.item() == pytest.approx(2 * 60**0.5) and leaf.grad.norm().item() == pytest.approx(1)
    optimizer.zero_grad()
    assert leaf.grad is None


# --- the same operations in every step


def test_the_operations_of_one_step_repeated_are_training(monkeypatch):
    """As a CUDA graph does it, which has the numbers and addresses of the step that it recorded: the fifth. Between two
    repetitions the host draws supports, and writes the step's corrections where the update reads them."""

    def trained(repeats):
        torch.manual_seed(0)
        model = CLIP(SMALL)
        towers = (
            [p for name, p in select_matrices(model, Blocks()).items() if ("visual" in name) == own] for own in (0, 1)
        )
        groups = [{"params": params, "lr": lr} for params, lr in zip(towers, (1e-3, 2e-3))]
        optimizer = SO(groups, density_ratio=0.002, T=3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        attached = attach(model, optimizer, dense_above=1)
        prompts = PackedPrompts(clip.tokenize(["a photo of a cat.", "a photo of a small dog."]))
        images, labels, losses = torch.zeros(3, 3, 32, 32), torch.zeros(3, dtype=torch.long), []

        def step():
            with torch.autocast("cpu", torch.bfloat16):
                image, text = model.encode_image(images), model.encode_text(prompts)
            loss = F.cross_entropy(100 * F.normalize(image.float()) @ F.normalize(text.float()).T, labels)
            loss.backward()
            updated[:] = optimizer.batches()
            optimizer.step()
            return loss

        updated, recorded = [], None
        for number in range(24):
            generator = torch.Generator().manual_seed(number)
            images.copy_(torch.randn(images.shape, generator=generator))
            labels.copy_(torch.randint(2, labels.shape, generator=generator))
            if not repeats or number < 4:
                loss = step()
            else:
                monkeypatch.setattr(SparseOptimizer, "arrange", None)  # its indices come from main memory
                attached.draw()
                optimizer.advance(updated)
                if recorded is None:
                    with mock.patch.object(optimizer, "finish"), Recorded() as recorded:
                        loss_of_record = step()
                    loss = loss_of_record
                else:
                    loss = recorded.replay()[id(loss_of_record)]
                optimizer.finish()
            losses.append(loss.item())
            scheduler.step()
        return losses, model.state_dict()

    (losses, weights), (again, repeated) = trained(repeats=False), trained(repeats=True)
    assert losses == again and len({*losses}) == 24
    assert all(torch.equal(t, repeated[name]) for name, t in weights.items())
