"""The command line. Each command imports only what it needs, so that ``--help`` and ``status`` are quick."""

import argparse
import faulthandler
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from weightsync.orchestrator.cli.audit import add_audit_commands
from weightsync.orchestrator.cli.common import (
    Commands,
    Exit,
    add_command,
    add_config_option,
    add_daemon_options,
    count,
    exit_codes_text,
    json_text,
    seconds,
)
from weightsync.orchestrator.cli.completion import SHELLS, script
from weightsync.orchestrator.cli.operator import add_verb_commands
from weightsync.orchestrator.settings.problems import ConfigError

Command = Callable[[argparse.Namespace], int]


def parser(command: str = "plan") -> argparse.ArgumentParser:
    """The parser of the whole command line; ``run`` of the parsed arguments is the command.

    The planner's own options are there only where ``command`` is "plan": they need NumPy, which takes a while.
    """
    top = argparse.ArgumentParser(
        prog="weightsync-orchestrator",
        description="Moves new weights from a trainer fleet into live vLLM engines, whole and verified.",
        epilog=exit_codes_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show which release this is")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_views(commands)
    add_verb_commands(commands)
    _add_config(commands)
    _add_doctor(commands)
    completion = add_command(commands, "completion", "print a script by which a shell completes commands")
    completion.add_argument("shell", choices=SHELLS, help="that is to read it")
    completion.set_defaults(run=_completion)
    add_audit_commands(commands)
    _add_tokens(commands)
    _add_admin_key(commands)
    _add_certs(commands)
    demo = commands.add_parser("demo", help="train a tiny model and push it into a real vLLM, here", add_help=False)
    demo.set_defaults(run=_demo)
    if command == "plan":
        from weightsync.orchestrator.cli.plan import add_plan_commands

        add_plan_commands(commands)
    else:
        commands.add_parser("plan", help="explain the plan of a running fleet, or simulate one", add_help=False)
    return top


class _Version(argparse.Action):
    """Looks the release up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from weightsync.orchestrator.release import release

        print(f"{parser.prog} {release()}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    rest: list[str] = []
    if given[:1] == ["demo"]:  # It has a parser of its own.
        given, rest = given[:1], given[1:]
    options = parser(given[0] if given else "").parse_args(given)
    options.rest = rest
    try:
        return int(options.run(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return Exit.CONFIG
    except BrokenPipeError:
        # The reader (head, less) has enough; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _add_run(commands: Commands) -> None:
    run = add_command(commands, "run", "run the daemon in the foreground")
    add_config_option(run)
    run.set_defaults(run=_run)


def _add_views(commands: Commands) -> None:
    status = add_command(commands, "status", "which engine serves which version, and what the last rounds cost")
    rounds = add_command(commands, "rounds", "history of rounds, oldest first")
    rounds.add_argument("--last", type=count, default=20, metavar="N", help="so many rounds (default 20)")
    rounds.add_argument("of", nargs="*", metavar="show ROUND", help="one round in full, by its name in the table")
    status.add_argument("--check", action="store_true", help="one line for monitors; exit 0 ok, 1 degraded, 2 critical")
    status.add_argument(
        "--ready", action="store_true", help="for health checks, without a token: exit 0 if the daemon works, else 75"
    )
    watch = add_command(commands, "watch", "the status, live, until interrupted")
    watch.add_argument("--every", type=seconds, default=2.0, metavar="SECONDS", help="between two looks (default 2)")
    watch.add_argument("--count", type=count, metavar="N", help="so many looks (default: without end)")
    report = add_command(commands, "report", "write the history of rounds as one HTML file with charts")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--out", type=Path, metavar="PATH", default=Path("rounds.html"), help="default: rounds.html")
    form.add_argument("--json", action="store_true", help="print what the report holds as JSON, and write no file")
    report.add_argument("--last", type=count, default=1000, metavar="N", help="so many rounds (default 1000)")
    watch.add_argument("--json", action="store_true", help="print each look as one line of JSON")
    for command in (status, rounds):
        add_daemon_options(command)
    for command in (watch, report):
        add_daemon_options(command, json=False)
    status.set_defaults(run=_view("status"))
    rounds.set_defaults(run=_view("rounds"))
    watch.set_defaults(run=_watch)
    report.set_defaults(run=_report)


def _add_config(commands: Commands) -> None:
    config = add_command(commands, "config", "check a configuration, or print an example or the schema")
    actions = config.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = add_command(actions, "check", "check a configuration and what it points to")
    check.add_argument("path", type=Path, metavar="PATH", help="the configuration file")
    check.add_argument("--probe", action="store_true", help="ask each engine for its routes, too")
    check.set_defaults(run=_check)
    check.add_argument("--json", action="store_true", help="print JSON")
    schema = add_command(actions, "schema", "print the JSON schema of the configuration")
    schema.set_defaults(run=_schema)
    example = add_command(actions, "example", "print a configuration that explains every key")
    example.set_defaults(run=_example)


def _add_doctor(commands: Commands) -> None:
    text = "look for known traps on this host, at the engines and at the daemon; exit 0 none, 1 warnings, 2 errors"
    doctor = add_command(commands, "doctor", text)
    add_config_option(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--timeout", type=seconds, default=10.0, metavar="SECONDS", help="for each answer (default 10)")
    doctor.set_defaults(run=_doctor)


def _add_tokens(commands: Commands) -> None:
    tokens = add_command(commands, "tokens", "make the token files of a run, one for each role")
    tokens.add_argument("directory", type=Path, metavar="DIR", help="the configuration's credentials")
    tokens.add_argument("--role", action="append", help="such as engine, or engine.NAME; again for more (default: all)")
    tokens.add_argument("--json", action="store_true", help="print JSON")
    tokens.set_defaults(run=_tokens)


def _add_certs(commands: Commands) -> None:
    certs = add_command(commands, "certs", "make a small authority of a run, and certificates of daemon and clients")
    certs.add_argument("directory", type=Path, metavar="DIR", help="where; what is there already is kept")
    certs.add_argument("--role", action="append", help="such as engine, or engine.NAME; again for more (default: all)")
    certs.add_argument("--host", action="append", metavar="NAME", help="by which the daemon is reached; again for more")
    certs.add_argument("--days", type=count, default=365, metavar="N", help="until they expire (default 365)")
    certs.add_argument("--json", action="store_true", help="print JSON")
    certs.set_defaults(run=_certs)


def _add_admin_key(commands: Commands) -> None:
    key = add_command(commands, "admin-key", "print the key that opens an engine's admin routes")
    key.add_argument("engine", metavar="ENGINE", help="its name in the configuration")
    key.add_argument("--json", action="store_true", help="print JSON")
    add_config_option(key)
    key.set_defaults(run=_admin_key)


def _admin_key(options: argparse.Namespace) -> int:
    from weightsync.orchestrator.daemon.engines.kinds import admin_keys
    from weightsync.orchestrator.settings.credentials import read_credentials
    from weightsync.orchestrator.settings.settings import load

    settings = load(options.config)
    keys = admin_keys(read_credentials(settings.credentials), settings.run.id, options.engine)
    if not keys:
        fix = f"weightsync-orchestrator tokens {settings.credentials} --role engine.{options.engine}"
        print(f"{settings.credentials} has no token for engine {options.engine}. Fix: {fix}", file=sys.stderr)
        return Exit.CONFIG
    if settings.engines_admit is None and options.engine not in (known := [each.name for each in settings.engines]):
        print(f"there is no engine {options.engine!r}; engines are: {', '.join(known)}", file=sys.stderr)
        return Exit.REFUSED
    print(json_text({"engine": options.engine, "key": keys[0]}) if options.json else keys[0])
    return Exit.OK


def _certs(options: argparse.Namespace) -> int:
    try:
        from weightsync.orchestrator.cli.certs import make_certificates
    except ModuleNotFoundError as error:
        print(f"there is no {error.name} here. Fix: pip install 'weightsync-orchestrator[certs]'", file=sys.stderr)
        return Exit.UNAVAILABLE
    from weightsync.orchestrator.settings.credentials import ROLES

    hosts = options.host or [socket.gethostname(), "localhost", "127.0.0.1"]
    return _say_made(options, lambda: make_certificates(options.directory, hosts, options.role or ROLES, options.days))


def _say_made(options: argparse.Namespace, make: Callable[[], list[Path]]) -> int:
    directory: Path = options.directory
    try:
        made = [str(path) for path in make()]
    except (FileExistsError, NotADirectoryError):
        print(f"{directory}: is no directory. Fix: name one, or where one can be made", file=sys.stderr)
        return Exit.CONFIG
    except (OSError, ValueError) as error:
        print(f"{directory}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return Exit.CONFIG
    print(json_text({"made": made}) if options.json else "\n".join(made) or f"{directory} has all of them already")
    return Exit.OK


def _tokens(options: argparse.Namespace) -> int:
    from weightsync.orchestrator.settings.credentials import ROLES, make_tokens

    return _say_made(options, lambda: make_tokens(options.directory, tuple(options.role or ROLES)))


def _run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again
    faulthandler.enable()  # the watchdog of a supervisor ends a daemon that stands still with SIGABRT
    from weightsync.orchestrator.cli.config import findings_of
    from weightsync.orchestrator.daemon import log
    from weightsync.orchestrator.settings.settings import load

    loaded = load(options.config)
    errors = [finding.text for finding in findings_of(loaded) if finding.level == "error"]
    if errors:
        print("\n".join(errors), file=sys.stderr)
        return Exit.CONFIG
    log.configure(loaded.log)
    log.about(loaded.run.id)

    from weightsync.orchestrator.core.errors import JournalUnreadable, WeightsyncError
    from weightsync.orchestrator.daemon.engines.errors import UnknownEngineKind
    from weightsync.orchestrator.daemon.journal import JournalError, JournalLocked, JournalLost
    from weightsync.orchestrator.daemon.runner import run

    codes: dict[type[Exception], Exit] = {
        JournalLocked: Exit.TEMPORARY,
        JournalError: Exit.CONFIG,
        JournalLost: Exit.IO,
        JournalUnreadable: Exit.CONFIG,
        UnknownEngineKind: Exit.CONFIG,
        WeightsyncError: Exit.INTERNAL,
        OSError: Exit.TEMPORARY,
    }
    try:
        return run(loaded, lambda: load(options.config))
    except tuple(codes) as error:
        print(error, file=sys.stderr)
        return next(code for kind, code in codes.items() if isinstance(error, kind))


def _view(what: Literal["status", "rounds"]) -> Command:
    def show(options: argparse.Namespace) -> int:
        from weightsync.orchestrator.cli import status as cli_status

        return cli_status.show(what, options)

    return show


def _watch(options: argparse.Namespace) -> int:
    from weightsync.orchestrator.cli.watch import watch

    return watch(options)


def _report(options: argparse.Namespace) -> int:
    from weightsync.orchestrator.cli.report import report

    return report(options)


def _completion(options: argparse.Namespace) -> int:
    print(script(parser(), options.shell), end="")
    return Exit.OK


def _check(options: argparse.Namespace) -> int:
    from weightsync.orchestrator.cli import config as cli_config

    return cli_config.check(options.path, probe=options.probe, as_json=options.json)


def _schema(_: argparse.Namespace) -> int:
    from weightsync.orchestrator.cli import config as cli_config

    return cli_config.print_schema()


def _example(_: argparse.Namespace) -> int:
    from weightsync.orchestrator.cli import config as cli_config

    return cli_config.print_example()


def _doctor(options: argparse.Namespace) -> int:
    from weightsync.orchestrator.cli.doctor.command import diagnose

    return diagnose(options)


def _demo(options: argparse.Namespace) -> int:
    # By name: the demo builds on this package, which must not build on the demo.
    demo = importlib.import_module("weightsync.orchestrator.demo.command")
    return int(demo.main(options.rest))


if __name__ == "__main__":
    sys.exit(main())
