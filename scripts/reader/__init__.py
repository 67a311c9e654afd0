"""Making the reader in the box: questions from real passages, and the LoRA adapter that learns to answer them.

Passages become facts (`facts`), facts become questions (`asking`), questions and passages become contexts (`contexts`)
whose questions hang off them as branches (`branches`), so that a context is run once for all of them (`training`).
Knows the server's prompt and nothing else of it. Invariant: nothing is learned from what an evaluation file asks about.
"""
