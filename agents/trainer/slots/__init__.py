"""Registered trainer memory that holds converted weights ready to send."""

from weightsync.agents.trainer.slots.routing import ExpertParallel, SlotOptions
from weightsync.agents.trainer.slots.slot import SlotNote
from weightsync.agents.trainer.slots.slots import TrainerSlots

__all__ = ["ExpertParallel", "SlotNote", "SlotOptions", "TrainerSlots"]
