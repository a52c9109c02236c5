"""The entry point by which vLLM finds us: group ``vllm.general_plugins``.

vLLM calls ``register`` in the API server, in every engine core and in every worker, possibly more than once in one
process. A server started without ``--weight-transfer-config '{"backend": "weightsync"}'`` keeps its behaviour: every
hook asks ``backend.chosen`` first, and what costs anything (recorder, gate, NIXL) is imported only once it said yes.
"""

from typing import Final

from weightsync.agents.vllm.backend import BACKEND, logger

ADAPTER_MODULE: Final = "weightsync.agents.vllm.adapter.choose"
ADAPTER_CLASS: Final = "WeightsyncEngine"


def register() -> None:
    """Makes the backend known to this vLLM process; does nothing where it is known or vLLM has no such thing."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError as error:
        logger.debug("weightsync: this vLLM has no weight-transfer engines (%s); nothing to register", error)
        return
    if BACKEND in WeightTransferEngineFactory._registry:
        return
    from weightsync.agents.vllm import guard, hold
    from weightsync.agents.vllm.holders import balancer
    from weightsync.agents.vllm.lora import hook
    from weightsync.agents.vllm.recorder import load_hook

    guard.install()
    hold.install()
    balancer.install()
    hook.install()
    load_hook.install()
    WeightTransferEngineFactory.register_engine(BACKEND, ADAPTER_MODULE, ADAPTER_CLASS)
