"""The agents' side of the tcpstore test, run as a script: ranks 1 … N as processes that share one import of vLLM."""

import multiprocessing
import sys

from weightsync.agents.link.process_group import SpgRendezvous
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import Announce, Ready, TcpStoreRendezvous

SECONDS = 30.0


def take_part(port: int, rank: int, world: int) -> None:
    group = SpgRendezvous(TcpStoreRendezvous("127.0.0.1", port, rank, world, SECONDS))
    group.announce(Announce(layout=Layout((), (), b""), endpoint_name=f"agent {rank}", endpoint=bytes(20_000)))
    connect = group.connect()
    group.ready(Ready(fingerprint=f"{connect.fingerprint} for {rank}"))
    group.barrier(SECONDS)
    group.close()


if __name__ == "__main__":
    import vllm.distributed.utils  # noqa: F401  # once, before the fork

    port, world = int(sys.argv[1]), int(sys.argv[2])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=take_part, args=(port, rank, world)) for rank in range(1, world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(sum(process.exitcode != 0 for process in processes))
