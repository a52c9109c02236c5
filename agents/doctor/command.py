"""``python -m weightsync.agents doctor``: what this environment would do to a trainer rank or an engine."""

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from weightsync.agents.doctor import hub, memory, server
from weightsync.agents.environment import network, packages
from weightsync.agents.environment.directory import run_directory
from weightsync.agents.environment.links import Interface, links
from weightsync.agents.environment.preflight import Check, Surroundings, checks
from weightsync.agents.environment.variables import Role
from weightsync.agents.inference.place import PlaceError, place_of
from weightsync.agents.memory.nic import Gpu, all_gpus, visible_gpus
from weightsync.agents.trainer.options import TrainerSettingsError, trainer_settings
from weightsync.orchestrator.protocol.findings import Finding, Findings, broke, examined, exit_code, findings_text
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.text import clean

MAX_SECONDS: Final = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 with warnings, 2 with errors or a wrong command line."""
    options = _parser().parse_args(arguments)
    role: Role = options.role or ("engine" if "WEIGHTSYNC_ENGINE" in os.environ else "trainer")
    findings = diagnose(role, options, os.environ)
    if options.json:
        told = Findings(place=f"{role} on {socket.gethostname()}", findings=tuple(findings))
        print(msgspec.json.format(msgspec.json.encode(told)).decode())
    else:
        print(f"{role} on {socket.gethostname()}\n\n{findings_text(findings)}")
    return exit_code(findings)


def diagnose(role: Role, options: argparse.Namespace, environ: Mapping[str, str]) -> list[Finding]:
    """All findings of a ``role``."""
    gpus: list[Gpu] = []
    everywhere: list[Interface] = []
    found = examined("GPUs", lambda: _gpus(environ, gpus))
    found += examined(network.CHECK, lambda: _links(everywhere))
    around = Surroundings(role, environ, gpus, everywhere)
    for check, look in (*_installed(around), *checks(around, NixlSettings(rails=options.rails))):
        found += examined(check, look)
    if options.weights_gb is not None:
        found += examined("memory", lambda: memory.room(role, int(options.weights_gb * 1e9), bool(gpus)))
    try:
        found += asyncio.run(_ways(role, options, environ))
    except Exception as error:  # as ``examined``
        found.append(broke("daemon", error))
    return found


def _installed(around: Surroundings) -> Iterable[Check]:
    """What a process that runs already has."""
    gpus, torch = len(around.gpus), packages.release_of("torch")
    yield "torch", lambda: [*packages.required("torch", torch), *packages.torch_with_cuda(torch, gpus)]
    yield "nixl", lambda: packages.nixl(gpus)
    if around.role == "engine":
        yield "vllm", lambda: packages.required("vllm", packages.release_of("vllm"))
        yield "plugin", packages.plugin
        yield "vllm", lambda: server.engine(around.environ, packages.PLUGIN)


def _gpus(environ: Mapping[str, str], gpus: list[Gpu]) -> Iterable[Finding]:
    """Puts the GPUs that this process sees into ``gpus``."""
    present = all_gpus()
    named = environ.get("CUDA_VISIBLE_DEVICES")
    gpus.extend(visible_gpus(present, named))
    if present and named and len(gpus) < len(named.split(",")):
        what = f"CUDA_VISIBLE_DEVICES={named} names GPUs that are not here: {len(gpus)} of {len(present)} are seen"
        return [Finding("warning", what, "name GPUs that nvidia-smi -L shows", "CUDA_VISIBLE_DEVICES")]
    return [Finding("ok", f"{len(gpus)} of {len(present)} are seen", check="GPUs")]


def _links(everywhere: list[Interface]) -> Iterable[Finding]:
    """Puts this host's ports and interfaces into ``everywhere``; what is wrong with them others say."""
    everywhere.extend(links())
    return ()


async def _peer(name: str, seconds: float) -> list[Finding]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            answer = await loop.getaddrinfo(name, None, family=socket.AF_INET)
    except (OSError, UnicodeError, TimeoutError) as error:
        what = f"{name} has no IPv4 address: {getattr(error, 'strerror', None) or type(error).__name__}"
        return [Finding("error", clean(what), "mend the name, or the resolver", network.CHECK)]
    addresses = sorted({str(address[0]) for *_, address in answer})
    return examined(network.CHECK, lambda: network.peers(addresses, links()))


async def _ways(role: str, options: argparse.Namespace, environ: Mapping[str, str]) -> list[Finding]:
    """To the daemon, the run directory and other hosts."""
    found = [finding for name in options.peer for finding in await _peer(name, options.timeout)]
    if role == "trainer":
        try:
            settings = trainer_settings(environment=environ)
        except TrainerSettingsError as error:
            return [*found, Finding("error", str(error), "set them here, or pass them to TrainerAgent", "settings")]
        url, token_file, run_id = settings.hub_url, settings.token_file, settings.run_id
        found += examined("run directory", lambda: run_directory(settings.run_dir))
    else:
        try:
            place = place_of(environ)
        except PlaceError as error:
            what, _, fix = str(error).partition(". Fix: ")
            return [*found, Finding("error", what, fix or "mend the file of that variable", "settings")]
        found += server.guard(environ, place)
        if not (place.hub_url and place.run_id):
            return found  # a demo's daemon says where it is
        url, token_file, run_id = place.hub_url, place.token_file, place.run_id
    found += examined("hub_url", lambda: hub.plain(url))
    found += examined("token", lambda: hub.token(token_file))
    return found + await hub.daemon(url, token_file, run_id, options.timeout)


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=f"{Path(sys.executable).name} -m weightsync.agents")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "look for known traps in the environment of a trainer rank or an engine; exit 0 none, 1 warnings, 2 errors"
    doctor = commands.add_parser("doctor", help=text, description=text)
    doctor.add_argument(
        "role", nargs="?", choices=("trainer", "engine"), help="default: engine if WEIGHTSYNC_ENGINE is set"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--timeout", type=_seconds, default=10.0, metavar="SECONDS", help="for the daemon (default 10)")
    rails = "the daemon's transport.rails"
    doctor.add_argument(
        "--rails", type=int, choices=range(1, 17), default=NixlSettings().rails, metavar="N", help=rails
    )
    doctor.add_argument(
        "--peer", action="append", default=[], metavar="HOST", help="a host that writes go to or come from"
    )
    doctor.add_argument(
        "--weights-gb", type=_seconds, metavar="GB", help="weights of one rank: is there room for them?"
    )
    return top


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number above 0 and up to {MAX_SECONDS:g}")
    return number
