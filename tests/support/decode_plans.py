"""Plans of a prefill and many decode steps, for runners of the tiny model, and a run of them ahead
of their results."""

from dataclasses import replace

from workers.constraint.codec import Constraint
from workers.rank.runner import Runner
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart, StepPlan, StepResult

MAX_NUM_SEQS = 6
NUM_STEPS = 20
GREEDY = SamplingParams(temperature=0, seed=0)
MIXED = (
    GREEDY,
    SamplingParams(temperature=0.8, top_p=0.9, seed=5),
    SamplingParams(temperature=0, seed=1, repetition_penalty=1.3),
    SamplingParams(temperature=0, seed=0, logprobs=2),
    GREEDY,
)
NUM_BLOCKS = 32
MAX_MODEL_LEN = 96


def plans(sampling: tuple[SamplingParams, ...], constraint: Constraint | None = None) -> list[StepPlan]:
    """Return plans of prompts of 4, 5, … tokens, then decode steps; half-way a sequence ends and
    another takes its slot. A sequence has six blocks.

    Args:
        constraint: that of the first sequence.
    """
    count = len(sampling)
    starts = tuple(
        SequenceStart(seq, tuple(range(1, 5 + seq)), 4 + seq, params) for seq, params in enumerate(sampling)
    )
    automata: tuple[tuple[bytes, bytes], ...] = ()
    if constraint is not None:
        automata = ((constraint.id, constraint.body),)
        starts = (replace(starts[0], constraint=constraint.id), *starts[1:])
    blocks = tuple(
        (seq, tuple(range(1 + 6 * seq, 7 + 6 * seq)), tuple(range(1 + 6 * seq, 7 + 6 * seq)))
        for seq in range(count)
    )
    lengths = {seq: 4 + seq for seq in range(count)}
    made = [
        StepPlan(
            0,
            starts,
            (),
            tuple(lengths),
            (0,) * count,
            tuple(lengths.values()),
            (True,) * count,
            blocks,
            automata,
        )
    ]
    for step in range(1, NUM_STEPS):
        if step == NUM_STEPS // 2:
            replaced = SequenceStart(count, (9, 8, 7), 3, GREEDY)
            del lengths[0]
            seq_ids = (*lengths, count)
            counts = (1,) * len(lengths) + (3,)
            block = ((len(lengths), blocks[0][1], blocks[0][2]),)
            made.append(
                StepPlan(
                    step, (replaced,), (0,), seq_ids, (*lengths.values(), 0), counts, (True,) * count, block
                )
            )
            lengths[count] = 2
        else:
            made.append(
                StepPlan(step, (), (), tuple(lengths), tuple(lengths.values()), (1,) * count, (True,) * count)
            )
        lengths = {seq: length + 1 for seq, length in lengths.items()}
    return made


def ahead(runner: Runner, steps: list[StepPlan]) -> list[StepResult]:
    """Launch each step before the result of the previous one was taken."""
    results = []
    pending = runner.launch(steps[0])
    for plan in steps[1:]:
        following = runner.launch(plan)
        results.append(pending.result())
        pending = following
    return [*results, pending.result()]


def tokens(results: list[StepResult]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(result.seq_ids, result.token_ids) for result in results]


def with_drafts(steps: list[StepPlan], answers: list[StepResult]) -> list[StepPlan]:
    """Return two plans for two sequences: the prefill, which also asks for log-probabilities of the
    prompts, and a step with two drafts each, of which the second sequence's last one is wrong.

    Args:
        steps: `plans` for two sequences.
        answers: results of the first four.
    """
    first, second = zip(*(result.token_ids for result in answers[:4]), strict=True)
    prefill, decode = steps[:2]
    wrong = (second[2] + 1) % 100
    return [
        replace(prefill, prompt_logprobs=((0, 1, 3, 2), (1, 1, 4, 1))),
        replace(
            decode,
            num_scheduled_tokens=(3, 3),
            drafts=((0, (first[1], first[2])), (1, (second[1], wrong))),
        ),
    ]


def check_drafts(found: list[StepResult], expected: list[StepResult], answers: list[StepResult]) -> None:
    """Check the results of the plans of `with_drafts` against a reference's, and their tokens
    against those that came one by one."""
    first, second = zip(*(result.token_ids for result in answers[:4]), strict=True)
    assert found[1].num_tokens == (3, 2)
    assert found[1].token_ids == (*first[1:4], *second[1:3])
    assert tokens(found) == tokens(expected)
    assert {seq_id: len(entries) for seq_id, entries in found[0].prompt_logprobs.items()} == {0: 3, 1: 4}
    for seq_id, entries in expected[0].prompt_logprobs.items():
        for ours, theirs in zip(found[0].prompt_logprobs[seq_id], entries, strict=True):
            assert abs(ours.logprob - theirs.logprob) < 1e-3
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
