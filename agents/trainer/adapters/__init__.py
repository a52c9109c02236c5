"""Doors for trainers of other projects: each module speaks one framework's interface and publishes by a stream.

A module imports its framework, and nothing else imports the module: ``vllm`` (vLLM's own trainer API), ``trl`` and
``verl``. Their names are those of the frameworks; imports are absolute everywhere, so the two never meet.
"""
