"""The behaviour of the code before its restructuring, recorded and replayed after every commit.

`python -m tests.golden.before.record` records it, `test_before.py` replays it. It is there for the
restructuring, and goes at its end except for what is worth keeping. All that is looked at is what
clients and operators see: HTTP, server-sent events, gRPC, `LLM`, the command line, metrics, and the
bytes between engine and ranks. `internals.py` is the only file that imports what may be moved.
"""
