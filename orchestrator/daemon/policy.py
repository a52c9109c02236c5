"""What the core is told of the settings."""

from ipaddress import ip_network

from weightsync.orchestrator.core.policy import Admission, EngineConfig, Policy
from weightsync.orchestrator.protocol.application import is_host_name
from weightsync.orchestrator.settings.sections import EnginesAdmitSection
from weightsync.orchestrator.settings.settings import Settings


def policy_of(settings: Settings) -> Policy:
    """The numbers that the core decides by; seconds where the settings say so."""
    deadlines = settings.deadlines
    return Policy(
        run_id=settings.run.id,
        run_dir=str(settings.run.directory),
        engines=tuple(EngineConfig(engine.name, engine.pair or "", engine.servers) for engine in settings.engines),
        admission=None if settings.engines_admit is None else _admission(settings.engines_admit),
        transport=settings.transport.message(settings.run.directory),
        group=settings.rendezvous.group_address(),
        trainer_world=settings.trainer.world,
        min_engines=settings.commit.min_engines,
        patience=settings.commit.patience_seconds,
        fan_out=settings.fan_out,
        together=settings.commit.together,
        lease=settings.commit.lease_seconds,
        retry=settings.retry.give_up_seconds,
        backoff=settings.retry.backoff_seconds,
        join=deadlines.join_seconds,
        staged=deadlines.staged_seconds,
        probe=deadlines.probe_seconds,
        probe_interval=deadlines.probe_interval_seconds,
        attach=deadlines.attach_seconds,
        pause=deadlines.pause_seconds,
        quiesce=deadlines.quiesce_seconds,
        transfer=deadlines.transfer_seconds,
        verify=deadlines.verify_seconds,
        finish=deadlines.finish_seconds,
        heartbeat=deadlines.heartbeat_seconds,
        lost_after=deadlines.lost_after_heartbeats,
    )


def _admission(section: EnginesAdmitSection) -> Admission:
    names = [host for host in section.hosts if "/" not in host and is_host_name(host)]
    return Admission(
        names=section.names,
        host_names=tuple(name.lower() for name in names),
        networks=tuple(ip_network(host) for host in section.hosts if host not in names),
        at_most=section.at_most,
        leave=section.leave_seconds,
        proxies=tuple(map(ip_network, section.proxies)),
    )
