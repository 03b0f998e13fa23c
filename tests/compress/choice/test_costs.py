"""Costs of every family: what they predict of a cut is what the cut model has."""

import pytest
import torch

from fastdistill.compress.choice.costs import Cost, flops, kinds, latency, sizes
from fastdistill.compress.surgery import cut
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import FAMILIES, anatomy_of
from fastdistill.models.families.family import BlockId, Workload
from tests import tiny_families as tiny

TINY = {
    "flux": tiny.tiny_flux,
    "flux2": tiny.tiny_flux2,
    "flux3": tiny.tiny_flux3,
    "chroma": tiny.tiny_chroma,
    "sd3": lambda: tiny.tiny_sd3(4),
    "sd3-dual": lambda: tiny.tiny_sd3(5, dual_attention_layers=(1, 4)),
    "qwen_image": tiny.tiny_qwen_image,
    "z_image": tiny.tiny_z_image,
    "sana": tiny.tiny_sana,
    "pixart": tiny.tiny_pixart,
}
LOAD = Workload(height=8, width=8, text_tokens=5)
every_family = pytest.mark.parametrize("name", TINY)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cuts(network, anatomy):
    """The first, the last, and all but the first of the last list."""
    stack = anatomy.stacks[-1].attribute
    count = sum(block_id.stack == stack for block_id in block_ids(network, anatomy))
    return [[BlockId(stack=stack, index=index) for index in indices] for indices in ([0], [count - 1], range(1, count))]


def test_every_family_is_here():
    assert {type(make()).__name__ for make in TINY.values()} == set(FAMILIES)


@every_family
def test_examples_are_what_the_model_takes(name):
    network = TINY[name]().eval()
    anatomy = anatomy_of(network)
    with torch.no_grad():
        one, two = (
            network(**anatomy.example(network, Workload(height=8, width=12, text_tokens=5, batch=n)))[0] for n in (1, 2)
        )
    assert len(two) == 2 * len(one) == 2


@every_family
def test_a_cut_saves_what_its_blocks_cost(name):
    network = TINY[name]()
    anatomy = anatomy_of(network)
    size, work = sizes(network, anatomy, 2)["params"], flops(network, anatomy, LOAD)
    assert size.total == network.num_parameters()
    for dropped in cuts(network, anatomy):
        smaller = cut(network, dropped)
        left, operations = smaller.num_parameters(), flops(smaller, anatomy, LOAD).total
        if name == "chroma":
            # The approximator has a wider first layer, and fewer rows: what the remark says.
            left -= (
                smaller.distilled_guidance_layer.in_proj.weight.numel()
                - network.distilled_guidance_layer.in_proj.weight.numel()
            )
            assert 0.5 * work.left(dropped) < operations
        else:
            assert operations == work.left(dropped)
        assert left == size.left(dropped)


@every_family
def test_every_block_is_timed(name):
    network = TINY[name]().eval()
    anatomy = anatomy_of(network)
    cost = latency(network, anatomy, LOAD)
    work = flops(network, anatomy, LOAD)
    assert list(cost.blocks) == block_ids(network, anatomy)
    assert all((time > 1000) == (work.blocks[block_id] > 0) for block_id, time in cost.blocks.items())


def test_a_block_that_its_place_makes_smaller_is_of_the_kind_it_would_be_elsewhere():
    network = TINY["sd3-dual"]()
    anatomy = anatomy_of(network)
    assert [[block_id.index for block_id in kind] for kind in kinds(network, anatomy)] == [[0, 2, 3], [1, 4]]
    params = sizes(network, anatomy, 2)["params"]
    assert isinstance(params, Cost)
    assert len(set(params.blocks.values())) == 2
