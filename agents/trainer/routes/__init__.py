"""Routes without a table: which of the trainer's tensors become what the engines need, and how.

``treatments`` says what each needed tensor is on the wire; ``mapping`` asks transformers which names it would save;
``routes`` finds a source for each needed tensor, or says by name which have none.
"""
