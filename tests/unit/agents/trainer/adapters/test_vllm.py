"""vLLM's trainer API: the installed package's own classes, and the source of 0.33 beside them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from trainer_ranks import CONFIG
from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm_0_33_source import ModuleSource as Source33
from weightsync.agents.trainer.adapters import vllm as adapter
from weightsync.agents.trainer.adapters.vllm import WeightsyncTrainerEngine, WeightsyncTrainerInitInfo
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.streams.streamed import StreamedTensor, StreamError


def info(folder: Path, rank: int = 0, **more: Any) -> WeightsyncTrainerInitInfo:
    token = folder / f"token {rank}"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    given = {"hub_url": "ws://127.0.0.1:9/agents", "token_file": token, "run_id": "r", "run_dir": folder}
    return WeightsyncTrainerInitInfo(rank=rank, **given, **more)


def codes() -> nn.Module:
    """A module with one parameter that cannot travel."""
    module = nn.Linear(2, 2)
    module.bias = nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
    return module


def test_the_factory_makes_it_by_the_init_infos_name(tmp_path: Path) -> None:
    made = WeightTransferTrainerFactory.trainer_init(info(tmp_path), client=None, source=ModuleSource(nn.Linear(2, 2)))
    assert type(made) is WeightsyncTrainerEngine
    assert (made.rank, made.is_sender, made.step) == (0, True, 0)
    with pytest.raises(ValueError, match="needs source=WeightSource"):
        WeightTransferTrainerFactory.trainer_init(info(tmp_path), client=None)
    with pytest.raises(ValueError, match="rank 2 is outside of the 1 trainer ranks"):
        WeightTransferTrainerFactory.trainer_init(info(tmp_path, 2), client=None, source=ModuleSource(nn.Linear(2, 2)))


def test_versions_are_counted_or_given(tmp_path: Path) -> None:
    class Later(ModuleSource):  # metadata and iteration disagree, which is found before anything is sent
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield from super().__iter__()
            yield "surprise", torch.ones(2)

    given = info(tmp_path, first_step=4, model_config=CONFIG)
    made = WeightsyncTrainerEngine.trainer_init(given, source=Later(nn.Linear(2, 2)))
    for asked, step in ((None, 4), (9, 9), (None, 10)):
        with pytest.raises(PublishError, match=rf"step {step} .*has 1 that it did not have before \(surprise\)"):
            made.send_weights(asked)
        assert made.step == step
    made.shutdown()


def test_a_failure_reaches_ranks_that_only_gather(in_ranks, tmp_path: Path) -> None:
    """0.32: rank 0 sends, the other rank drains, and both raise."""

    class Broken(ModuleSource):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield "weight", torch.ones(2, 2)

    def body(rank: int) -> str:
        source = Broken(nn.Linear(2, 2))
        made = WeightsyncTrainerEngine.trainer_init(info(tmp_path, rank, model_config=CONFIG), source=source)
        with pytest.raises(PublishError) as caught:
            made.send_weights()
        return str(caught.value)

    said = in_ranks(2, body)
    assert "lacks 1 of its 2 tensors (bias)" in said[0]
    assert said[1].startswith("rank 0: PublishError")
    assert "lacks 1 of its 2 tensors (bias)" in said[1]


def test_held_names_make_every_rank_a_sender_of_its_own() -> None:
    class Stages(WeightSource):
        def __init__(self, held: set[str] | None) -> None:
            self._held = held

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, torch.float32, (2,)) for name in ("first", "second")]

        def held_names(self) -> set[str] | None:
            return self._held

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
            for name in ("first", "second"):
                yield name, torch.ones(2) if self._held is None or name in self._held else None

    first, second = (StreamedTensor(name, torch.float32, (2,)) for name in ("first", "second"))
    planned = adapter._planned(Stages({"second"}), 1, quantised=False)
    assert planned == adapter._Pass([second], frozenset(), every_rank=True)
    assert [name for name, _ in adapter._passing(Stages({"second"}), pieces=False)] == ["second"]
    assert adapter._planned(Stages(None), 0, quantised=False).metadata == [first, second]
    plain = adapter._planned(ModuleSource(nn.Linear(2, 2)), 1, quantised=False)
    assert (plain.every_rank, [tensor.name for tensor in plain.metadata]) == (False, ["weight", "bias"])


def sharded(rank: int) -> nn.Module:
    mesh = DeviceMesh("cpu", [0, 1])
    module = nn.Linear(3, 5)
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)], src_data_rank=None))
    return module


def test_pieces_are_declared_as_033_does(in_ranks) -> None:
    def body(rank: int) -> tuple[adapter._Pass, dict[str, tuple[int, ...]]]:
        source = Source33(sharded(rank))
        pairs = adapter._passing(source, pieces=True)
        return adapter._planned(source, rank, quantised=False), {name: tuple(t.shape) for name, t in pairs}

    (planned, first), (other, second) = in_ranks(2, body)
    weight = StreamedTensor("weight", torch.float32, (5, 3), (0, 1), (2,), (0,))
    bias = StreamedTensor("bias", torch.float32, (5,))
    assert planned == other == adapter._Pass([weight, bias], frozenset(), every_rank=True, pieces=True)
    assert (first, second) == ({"weight": (3, 3), "bias": (5,)}, {"weight": (2, 3), "bias": (5,)})


def test_pieces_that_two_words_do_not_say_are_refused_by_name(in_ranks) -> None:
    class Own(Source33):
        """A trainer's own source, which gives torch's placements as they are."""

        @property
        def metadata(self) -> list[Any]:
            given = {name: p for name, p in self._module.named_parameters() if isinstance(p, DTensor)}
            return [replace(m, placements=given[m.name].placements) if m.name in given else m for m in super().metadata]

    def body(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        heard = []
        for odd in (_StridedShard(0, split_factor=2), Partial()):
            module = nn.Linear(8, 8, bias=False)
            placed = DTensor.from_local(
                torch.ones(2, 8), mesh, [odd, Shard(0)], run_check=False, shape=torch.Size((8, 8)), stride=(8, 1)
            )
            module.weight = nn.Parameter(placed)
            for source in (Source33(module), Own(module)):
                try:
                    adapter._planned(source, rank, quantised=False)
                except StreamError as error:
                    heard.append(str(error))
        return heard

    for heard in in_ranks(4, body):
        assert [text.split(",")[0].split("(")[0] for text in heard] == [
            "'weight' is placed by _StridedShard", "'weight' is placed by _StridedShard",
            "'weight' is placed by Partial", "'weight' is placed by Partial",
        ]  # fmt: skip
        assert all("pieces are known by Shard and Replicate alone" in text for text in heard)


def test_whole_tensors_of_033_come_from_their_first_owner(in_ranks) -> None:
    class Stages(Source33):
        """Rank 0 owns the bias, rank 1 the weight."""

        @property
        def metadata(self) -> list[Any]:
            owners = {"weight": (1,), "bias": (0, 1)}
            return [replace(m, owners=owners[m.name], mesh_shape=None, placements=None) for m in super().metadata]

    planned = adapter._planned(Stages(nn.Linear(3, 5), local=False), 1, quantised=False)
    assert planned.every_rank
    assert planned.elsewhere == {"bias"}
    assert {tensor.name: tensor.owners for tensor in planned.metadata} == {"weight": (1,), "bias": (0,)}
    # All of a sharded model begin at rank 0, which then sends alone
    at_zero = in_ranks(2, lambda rank: adapter._planned(Source33(sharded(rank), local=False), rank, quantised=False))
    assert [(each.every_rank, sorted(each.elsewhere)) for each in at_zero] == [(False, []), (False, ["bias", "weight"])]


def test_blocks_are_quantised_from_whole_tensors_where_the_source_has_them(in_ranks) -> None:
    found = in_ranks(2, lambda rank: adapter._planned(Source33(sharded(rank)), rank, quantised=True).pieces)
    assert found == [False, False]
    found = in_ranks(2, lambda rank: adapter._planned(Source33(sharded(rank), full=False), rank, quantised=True).pieces)
    assert found == [True, True]


def test_ranks_that_send_pieces_need_a_process_group(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"initialise torch\.distributed first"):
        WeightsyncTrainerEngine.trainer_init(info(tmp_path, world=2), source=Source33(nn.Linear(2, 2)))


def test_a_process_group_of_another_order_is_refused_on_every_rank(in_ranks, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        assert dist.is_initialized()
        with pytest.raises(ValueError, match=rf"rank {1 - rank} of 2 is rank {rank} of the 2 of its process group"):
            WeightsyncTrainerEngine.trainer_init(info(tmp_path, 1 - rank), source=ModuleSource(nn.Linear(2, 2)))

    in_ranks(2, body)


def test_parameters_that_cannot_travel_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"metadata of 'bias': dtype torch\.int32 is no weight"):
        WeightsyncTrainerEngine.trainer_init(info(tmp_path), source=ModuleSource(codes()))
