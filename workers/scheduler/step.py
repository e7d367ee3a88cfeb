"""One step: how its plan is built, the record of it while it is in flight, and how its result is
taken in."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress, islice

from workers.config import BLOCK_SIZE
from workers.kv_cache.manager import KVCacheManager
from workers.scheduler.plan import SequenceStart, StepPlan, StepResult
from workers.scheduler.sequence import Sequence, SequenceUpdate


class PlanBuilder:
    """The step being planned.

    Attributes:
        entries: (sequence, its seq_id, num_computed_tokens, num_scheduled_tokens, samples) in batch
            order.
    """

    __slots__ = ("drafts", "entries", "new_blocks", "prompt_logprobs", "starts")

    def __init__(self) -> None:
        self.starts: list[SequenceStart] = []
        self.entries: list[tuple[Sequence, int, int, int, bool]] = []
        self.new_blocks: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self.drafts: list[tuple[int, tuple[int, ...]]] = []
        self.prompt_logprobs: list[tuple[int, int, int, int]] = []

    def add_blocks(self, full: tuple[int, ...], sliding: tuple[int, ...]) -> None:
        """Append blocks to the tables of the sequence that is added next, on the ranks."""
        if full or sliding:
            self.new_blocks.append((len(self.entries), full, sliding))

    def claim_drafts(
        self, kv: KVCacheManager, sequence: Sequence, num_new: int, proposed: Iterable[int], limit: int
    ) -> int:
        """Add drafts to the sequence that is added next, as far as there are free blocks: no other
        sequence loses blocks to them.

        Args:
            num_new: number of tokens of the entry, which have blocks.
            limit: maximum number of drafts.
        Returns:
            Number of drafts added.
        """
        # Together with the tokens in flight and the one sampled last, the sequence has at most
        # max_len tokens.
        num_known = len(sequence.token_ids) + sequence.num_pending_tokens
        limit = min(limit, sequence.max_len - num_known - 1)
        drafts = tuple(islice(proposed, max(limit, 0)))
        if not drafts:
            return 0
        blocks = sequence.blocks
        num_full, num_sliding = len(blocks.full), len(blocks.sliding)
        num_granted = kv.grow(blocks, sequence.num_computed_tokens, num_new + len(drafts)) - num_new
        self.add_blocks(tuple(blocks.full[num_full:]), tuple(blocks.sliding[num_sliding:]))
        if num_granted > 0:
            self.drafts.append((len(self.entries), drafts[:num_granted]))
        return num_granted

    def ask_prompt_logprobs(self, sequence: Sequence, num_computed: int, num_new: int) -> None:
        """Ask for the log-probabilities of the prompt tokens that follow those of the entry that is
        added next, if its sequence wants any."""
        first = max(sequence.next_prompt_logprob, num_computed + 1)
        end = min(num_computed + num_new + 1, sequence.num_prompt_tokens)
        num_top = sequence.request.sampling.prompt_logprobs
        if num_top is not None and first < end:
            self.prompt_logprobs.append((len(self.entries), first, end - first, num_top))
            sequence.next_prompt_logprob = end

    def build(
        self,
        step: int,
        drops: tuple[int, ...],
        automata: tuple[tuple[tuple[bytes, bytes], ...], tuple[bytes, ...]],
    ) -> tuple[StepPlan, "list[Sequence | None]"]:
        """Return the plan and its sequences in batch order.

        Args:
            automata: as returned by `HeldAutomata.take_changes`.
        """
        sequences, seq_ids, num_computed_tokens, num_scheduled_tokens, samples = zip(
            *self.entries, strict=True
        )
        plan = StepPlan(
            step=step,
            starts=tuple(self.starts),
            drops=drops,
            seq_ids=seq_ids,
            num_computed_tokens=num_computed_tokens,
            num_scheduled_tokens=num_scheduled_tokens,
            samples=samples,
            new_blocks=tuple(self.new_blocks),
            automata=automata[0],
            dropped_automata=automata[1],
            drafts=tuple(self.drafts),
            prompt_logprobs=tuple(self.prompt_logprobs),
        )
        return plan, list(sequences)


@dataclass(slots=True)
class InFlight:
    """A plan whose result is not back. `sequences` runs parallel to `plan.seq_ids`; None for a
    sequence that no longer needs the result."""

    plan: StepPlan
    sequences: list[Sequence | None]


def check_result(plan: StepPlan, result: StepResult) -> None:
    """Refuse a result that does not have one token, or with drafts as many as may be, for each
    sequence that samples.

    Raises:
        ValueError: the result does not belong to this plan.
    """
    if result.seq_ids != tuple(compress(plan.seq_ids, plan.samples)):
        raise ValueError(f"the result of step {result.step} is not of the sequences that were to yield any")
    if not result.num_tokens:
        if len(result.token_ids) != len(result.seq_ids):
            raise ValueError(f"the result of step {result.step} does not have one token for each sequence")
        return
    num_drafts = dict.fromkeys(result.seq_ids, 0) | {
        plan.seq_ids[index]: len(drafts) for index, drafts in plan.drafts
    }
    if (
        len(result.num_tokens) != len(result.seq_ids)
        or sum(result.num_tokens) != len(result.token_ids)
        or any(
            not 1 <= count <= 1 + num_drafts[seq_id]
            for seq_id, count in zip(result.seq_ids, result.num_tokens, strict=True)
        )
    ):
        raise ValueError(f"the result of step {result.step} has tokens that its plan does not allow for")


def tokens_of(result: StepResult) -> list[tuple[int, ...]]:
    """Return the new tokens of each sequence of a result that passed `check_result`."""
    tokens = iter(result.token_ids)
    return [tuple(islice(tokens, count)) for count in result.num_tokens or (1,) * len(result.seq_ids)]


def commit(kv: KVCacheManager, plan: StepPlan, sequences: "list[Sequence | None]") -> None:
    """Give the prefix cache the blocks that the plan has filled, except those of entries with
    drafts."""
    entries = zip(sequences, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True)
    filled = [
        (sequence, start + count)
        for sequence, start, count in entries
        if start % BLOCK_SIZE + count >= BLOCK_SIZE
    ]
    for sequence, num_tokens in filled:
        if sequence is not None and not sequence.num_draft_tokens:
            kv.commit(sequence.blocks, sequence.token_ids, num_tokens)


def append_tokens(
    sequences: "Iterable[Sequence | None]", token_ids: tuple[int, ...], updates: list[SequenceUpdate]
) -> list[tuple[Sequence, SequenceUpdate]]:
    """Take in one token of each sequence and append the updates; return those that end one. Most
    of a step's time in `update` is spent here."""
    ends = []
    for sequence, token_id in zip(sequences, token_ids, strict=True):
        if sequence is None:
            continue
        sequence.num_pending_tokens -= 1
        reason = sequence.append(token_id)
        update = SequenceUpdate(sequence.seq_id, (token_id,), sequence.num_cached_tokens, reason)
        updates.append(update)
        if reason is not None:
            ends.append((sequence, update))
    return ends


def settle_drafts(
    kv: KVCacheManager,
    plan: StepPlan,
    sequences: "Iterable[Sequence | None]",
    token_lists: Iterable[tuple[int, ...]],
    updates: list[SequenceUpdate],
) -> list[tuple[Sequence, SequenceUpdate]]:
    """Take in each sequence's tokens up to one that ends it: `append_tokens` for entries that may
    have had drafts. Drafts of a sequence in the next plan stay open."""
    ends = []
    drafted = {plan.seq_ids[index] for index, _ in plan.drafts}
    for sequence, token_ids in zip(sequences, token_lists, strict=True):
        if sequence is None:
            continue
        sequence.num_pending_tokens -= 1
        num_kept, reason = sequence.extend(token_ids)
        if sequence.seq_id in drafted:
            # The last of these tokens was only sampled, not computed; drafts after it were wrong.
            sequence.num_draft_tokens = 0
            sequence.num_computed_tokens = len(sequence.token_ids) - 1
            kv.commit(sequence.blocks, sequence.token_ids, sequence.num_computed_tokens)
        update = SequenceUpdate(sequence.seq_id, token_ids[:num_kept], sequence.num_cached_tokens, reason)
        updates.append(update)
        if reason is not None:
            ends.append((sequence, update))
    return ends


def prompt_updates(
    plan: StepPlan, sequences: "list[Sequence | None]", result: StepResult
) -> list[SequenceUpdate]:
    """Return log-probabilities of prompt tokens for the sequences that asked and are still live.

    Raises:
        ValueError: they are not the ones that the plan asked for.
    """
    updates = []
    for index, first, count, _ in plan.prompt_logprobs:
        entries = result.prompt_logprobs.get(plan.seq_ids[index], ())
        if len(entries) != count:
            raise ValueError(
                f"the result of step {result.step} has {len(entries)} log-probabilities of prompt tokens "
                f"where {count} were asked for"
            )
        sequence = sequences[index]
        if sequence is not None:
            sequence.first_missing_prompt_logprob = first + count
            updates.append(SequenceUpdate(sequence.seq_id, prompt_logprobs=entries))
    return updates
