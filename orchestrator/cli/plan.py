"""``plan explain`` and ``plan simulate``: what a fleet's plan does, and what it would take elsewhere."""

import argparse
import asyncio
import os
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
from weightsync.orchestrator.cli.client import Denied, Unreachable, fetch, tls_for, token_for
from weightsync.orchestrator.cli.common import (
    CONFIG_VARIABLE,
    Commands,
    Exit,
    add_command,
    add_config_option,
    count,
    positive,
    seconds,
)
from weightsync.orchestrator.daemon.admin.views import LayoutsView
from weightsync.orchestrator.forecast.explain import LINKS, explain
from weightsync.orchestrator.forecast.published_models import GEOMETRIES
from weightsync.orchestrator.forecast.simulate import Hardware, simulate
from weightsync.orchestrator.forecast.synthetic_fleets import EngineFleet, TrainerFleet, engine_parties, trainer_parties
from weightsync.orchestrator.forecast.text import explanation_text, simulation_text
from weightsync.orchestrator.planner import CostModel, Party, Plan, PlanError, make_plan
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.settings.settings import load

SUFFIX: Final = ".msgpack"
"""Of layout files."""

MAX_ANSWER_BYTES: Final = 1 << 30
"""Layouts of a whole fleet: those of Kimi-K2 on 384 ranks are 400 MB of JSON."""

ROUTE: Final = "/plan/layouts"


class LayoutFile(msgspec.Struct, frozen=True):
    """One member's layout in a file, as msgpack."""

    member: Member
    incarnation: int
    layout: Layout


class Unusable(Exception):
    """Layouts cannot be read; the message says which and why."""


class NothingNamed(Exception):
    """The command line says neither a place of layouts nor a model."""


def add_plan_commands(commands: Commands) -> None:
    """Add ``plan explain`` and ``plan simulate``; ``run`` of the parsed arguments is the command."""
    plan = add_command(commands, "plan", "explain the plan of a running fleet, or simulate one")
    actions = plan.add_subparsers(title="actions", metavar="ACTION", required=True)
    explained = add_command(actions, "explain", "who sends what to whom, how, why, and how long it takes")
    simulated = add_command(actions, "simulate", "predict the transfer on a fleet that is not there")
    cost, rate = CostModel(), CostModel().bytes_per_second
    for command in (explained, simulated):
        command.add_argument(
            "--from", dest="source", metavar="PATH_OR_URL",
            help=f"a layout file, a directory of *{SUFFIX}, or a daemon's URL (default: the configuration's daemon)",
        )  # fmt: skip
        add_config_option(command, required=False)
        command.add_argument("--token-file", type=Path, metavar="PATH", help="file with the daemon's token")
        command.add_argument("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="of the daemon's answer")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--alpha", type=positive, default=cost.alpha_seconds, metavar="SECONDS",
                             help=f"per descriptor (default {cost.alpha_seconds:g})")  # fmt: skip
        command.add_argument("--bytes-per-second", type=positive, default=rate, metavar="RATE",
                             help=f"of one edge, for what is packed, in bytes/s (default {rate:g})")  # fmt: skip
    explained.add_argument("--top", type=count, default=20, metavar="N", help="rows per table (default 20)")
    explained.add_argument("--tensors", action="store_true", help="every tensor, not families of layers and experts")
    explained.set_defaults(run=_explain)
    _add_fleet(simulated)
    simulated.set_defaults(run=_simulate)


def _add_fleet(command: argparse.ArgumentParser) -> None:
    fleet = command.add_argument_group("fleet, without --from")
    fleet.add_argument("--model", choices=sorted(GEOMETRIES), help="sizes of a published model")
    fleet.add_argument("--trainer-ep", type=count, default=8, metavar="N", help="expert-parallel ranks (default 8)")
    fleet.add_argument("--fsdp", type=count, default=8, metavar="N", help="FSDP ranks per expert rank (default 8)")
    fleet.add_argument("--replicas", type=count, default=1, metavar="N", help="HSDP replicas that send (default 1)")
    fleet.add_argument("--expert-shards", choices=("experts", "rows"), default="experts",
                       help="what FSDP splits (default %(default)s)")  # fmt: skip
    fleet.add_argument("--engines", type=count, default=2, metavar="N", help="engines (default 2)")
    fleet.add_argument("--engine-ep", type=count, default=16, metavar="N", help="ranks per engine (default 16)")
    hardware, default = command.add_argument_group("hardware"), Hardware()
    hardware.add_argument("--nic-gbps", type=positive, default=default.nic_gbps, metavar="RATE",
                          help=f"of a port, in Gb/s (default {default.nic_gbps:g})")  # fmt: skip
    hardware.add_argument("--nics-per-node", type=count, default=default.nics_per_node, metavar="N",
                          help="ports (default %(default)s)")  # fmt: skip
    hardware.add_argument("--gpus-per-node", type=count, default=default.gpus_per_node, metavar="N",
                          help="GPUs (default %(default)s)")  # fmt: skip
    hardware.add_argument("--colocated", action="store_true", help="engines on the trainer's own GPUs")
    hardware.add_argument("--efficiency", type=positive, default=default.efficiency, metavar="PART",
                          help="of a port's rate that is reached (default %(default)s)")  # fmt: skip


def _explain(options: argparse.Namespace) -> int:
    measured: dict[str, float] = {}
    planned = _planned(options, lambda: _read(options, measured))
    if isinstance(planned, Exit):
        return planned
    links = {
        link: replace(cost, bytes_per_second=measured.get(link, 0.0) * 1e9 or cost.bytes_per_second)
        for link, cost in LINKS.items()
    }
    asked = CostModel(options.alpha, options.bytes_per_second)
    found = explain(planned, links if asked == CostModel() else {"asked": asked, **links}, every_tensor=options.tensors)
    print(msgspec.json.encode(found).decode() if options.json else explanation_text(found, options.top))
    return Exit.OK


def _simulate(options: argparse.Namespace) -> int:
    planned = _planned(options, lambda: _read(options, {}) if options.model is None else _imagined(options))
    if isinstance(planned, Exit):
        return planned
    hardware = Hardware(
        options.nic_gbps, options.nics_per_node, options.gpus_per_node, options.efficiency,
        alpha_seconds=options.alpha, colocated=options.colocated,
    )  # fmt: skip
    found = simulate(planned, hardware)
    print(msgspec.json.encode(found).decode() if options.json else simulation_text(found))
    return Exit.OK


def _imagined(options: argparse.Namespace) -> list[Party]:
    geometry = GEOMETRIES[options.model]
    trainer = TrainerFleet(options.trainer_ep, options.fsdp, options.replicas, options.expert_shards)
    try:
        return [
            *trainer_parties(geometry, trainer),
            *engine_parties(geometry, EngineFleet(options.engines, options.engine_ep)),
        ]
    except ValueError as error:
        raise Unusable(str(error)) from error


def _planned(options: argparse.Namespace, parties: Callable[[], list[Party]]) -> Plan | Exit:
    """The plan of the parties, or the exit code once the reason is printed."""
    code = Exit.CONFIG
    try:
        found = parties()
        sources = [p for p in found if p.member.role == "trainer"]
        targets = [p for p in found if p.member.role != "trainer"]
        return make_plan(sources, targets, CostModel(options.alpha, options.bytes_per_second))
    except Denied as error:
        code, reason = Exit.DENIED, str(error)
    except Unreachable as error:
        code, reason = Exit.TEMPORARY, str(error)
    except NothingNamed:
        code, reason = Exit.USAGE, f"give --from PATH_OR_URL, --config PATH, or set {CONFIG_VARIABLE}"
        if "model" in options:
            reason += "; or name a published model: --model"
    except (Unusable, PlanError) as error:
        reason = str(error)
    print(reason, file=sys.stderr)
    return code


def _read(options: argparse.Namespace, measured: dict[str, float]) -> list[Party]:
    """The layouts that ``--from`` or ``--config`` names; ``measured`` is given what a daemon has seen of its links.

    Raises:
        NothingNamed: there is no such place.
        Unusable, Denied, Unreachable: none can be had from there.
        ConfigError: the configuration or the token file cannot be used.
    """
    settings = load(options.config) if options.config is not None and options.source is None else None
    where: str | None = options.source if settings is None else settings.agents_url
    if where is None:
        raise NothingNamed
    if where.startswith(("http://", "https://")):
        token = token_for(options.token_file, settings)
        view = _from_daemon(where.rstrip("/") + ROUTE, token, options.timeout, tls_for(where, settings))
        measured.update(view.gb_per_s)
        return [Party(party.member, party.incarnation, party.layout) for party in view.parties]
    return read_layouts(Path(where))


def _from_daemon(url: str, token: str | None, timeout_seconds: float, tls: ssl.SSLContext | None) -> LayoutsView:
    data = asyncio.run(fetch(url, token, timeout_seconds, MAX_ANSWER_BYTES, tls=tls))
    try:
        return msgspec.json.decode(data, type=LayoutsView)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unusable(f"{url}: an answer that is not the daemon's: {error}") from error


def read_layouts(path: Path) -> list[Party]:
    """The parties of a layout file, or of all in a directory, by member.

    Raises:
        Unusable: no such file, or one that is not a layout.
    """
    # By the operating system's function, which knows no name that it fails at.
    files = sorted(path.glob(f"*{SUFFIX}")) if os.path.isdir(path) else [path]
    if not files:
        raise Unusable(f"{path} holds no *{SUFFIX}")
    parties = []
    for file in files:
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_FRAME_BYTES + 1)
            if len(data) > MAX_FRAME_BYTES:
                raise Unusable(f"{file} has more than {MAX_FRAME_BYTES} bytes, which no layout has")
            found = msgspec.msgpack.decode(data, type=LayoutFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Unusable(f"{file} is no layout: {error}") from error
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise Unusable(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        parties.append(Party(found.member, found.incarnation, found.layout))
    return sorted(parties, key=lambda party: party.member)


def write_layouts(parties: Sequence[Party], directory: Path) -> None:
    """One file per party, as ``read_layouts`` reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    for party in parties:
        data = msgspec.msgpack.encode(LayoutFile(party.member, party.incarnation, party.layout))
        (directory / (str(party.member).replace("/", "-") + SUFFIX)).write_bytes(data)
