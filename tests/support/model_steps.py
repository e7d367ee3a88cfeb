"""Steps of a GptOss without an engine: sequences with scattered KV blocks, advanced by any number
of tokens each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.config import BLOCK_SIZE, ModelConfig
from workers.model.gpt_oss import GptOss
from workers.model.step_batch import StepBatch

NULL_BLOCK = 0


class PagedSequences:
    """Token sequences and their paged KV caches.

    Caches start as NaN, blocks are handed out in a random order that differs between the two
    groups, and sliding blocks that fall behind the window are turned back into NaN and replaced by
    NULL_BLOCK: reading what must not be read shows in the logits.
    """

    def __init__(self, model: GptOss, num_blocks: int, seed: int = 0) -> None:
        self.model = model
        self.config: ModelConfig = model.config
        shape = (2, num_blocks, BLOCK_SIZE, model.num_kv_heads, self.config.head_dim)
        self.kv_caches = [
            torch.full(shape, float("nan"), dtype=model.dtype) for _ in self.config.layer_windows
        ]
        generator = torch.Generator().manual_seed(seed)
        self._free = {
            group: (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
            for group in ("full", "sliding")
        }
        self._tables: dict[str, dict[int, list[int]]] = {"full": {}, "sliding": {}}
        self._num_computed: dict[int, int] = {}

    def step(self, tokens: dict[int, Sequence[int]]) -> dict[int, Tensor]:
        """Append tokens to sequences (made on first use) in one forward; return the logits of each
        sequence's new tokens, [len, vocab]."""
        starts = {seq: self._num_computed.get(seq, 0) for seq in tokens}
        for seq, new in tokens.items():
            self._num_computed[seq] = starts[seq] + len(new)
            self._free_behind_window(seq, starts[seq])
            for group in ("full", "sliding"):
                table = self._tables[group].setdefault(seq, [])
                while len(table) * BLOCK_SIZE < self._num_computed[seq]:
                    table.append(self._free[group].pop())
        lengths = [len(new) for new in tokens.values()]
        positions = [starts[seq] + offset for seq, new in tokens.items() for offset in range(len(new))]
        owners = [seq for seq, new in tokens.items() for _ in new]
        batch = StepBatch(
            token_ids=torch.tensor([token for new in tokens.values() for token in new]),
            positions=torch.tensor(positions),
            slot_mapping_full=self._slots("full", owners, positions),
            slot_mapping_sliding=self._slots("sliding", owners, positions),
            block_table_full=self._block_table("full", list(tokens)),
            block_table_sliding=self._block_table("sliding", list(tokens)),
            context_lens=torch.tensor([self._num_computed[seq] for seq in tokens], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            sample_indices=torch.arange(sum(lengths)),
            max_query_len=max(lengths),
        )
        hidden = self.model.forward(batch, self.kv_caches)
        logits = self.model.compute_logits(hidden[batch.sample_indices])
        if logits is None:  # not the first rank, which alone has the logits
            logits = torch.zeros(len(positions), self.config.vocab_size)
        assert logits.isfinite().all(), "the model read a slot that it must not read"
        return dict(zip(tokens, logits.split(lengths), strict=True))

    def generate(self, prompts: dict[int, Sequence[int]], num_tokens: int) -> dict[int, list[int]]:
        """Return greedy tokens of all sequences, computed one step at a time."""
        out: dict[int, list[int]] = {seq: [] for seq in prompts}
        new: dict[int, Sequence[int]] = prompts
        for _ in range(num_tokens):
            logits = self.step(new)
            chosen = self.model.collectives.broadcast(
                torch.stack([rows[-1].argmax() for rows in logits.values()])
            )
            new = {seq: [token] for seq, token in zip(logits, chosen.tolist(), strict=True)}
            for seq, token in new.items():
                out[seq].extend(token)
        return out

    def _free_behind_window(self, seq: int, first_query: int) -> None:
        window = self.config.sliding_window
        table = self._tables["sliding"].get(seq, [])
        if window is None:
            return
        for index in range(max(0, first_query - window + 1) // BLOCK_SIZE):
            if table[index] != NULL_BLOCK:
                for layer_window, cache in zip(self.config.layer_windows, self.kv_caches, strict=True):
                    if layer_window is not None:
                        cache[:, table[index]] = float("nan")
                table[index] = NULL_BLOCK

    def _slots(self, group: str, owners: list[int], positions: list[int]) -> Tensor:
        tables = self._tables[group]
        return torch.tensor(
            [
                tables[seq][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
                for seq, at in zip(owners, positions, strict=True)
            ]
        )

    def _block_table(self, group: str, seqs: list[int]) -> Tensor:
        tables = [self._tables[group][seq] for seq in seqs]
        width = max(map(len, tables))
        # Entries past a sequence's end point at a block of NaN; they must not be read.
        return torch.tensor(
            [table + [NULL_BLOCK] * (width - len(table)) for table in tables], dtype=torch.int32
        )


def random_tokens(config: ModelConfig, length: int, seed: int) -> list[int]:
    """Return uniform random token ids."""
    return torch.randint(
        0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def whole_prompt_logits(model: GptOss, token_ids: Sequence[int]) -> Tensor:
    """Return [len, vocab] fp32 logits of one sequence computed in a single step."""
    num_blocks = -(-len(token_ids) // BLOCK_SIZE) + 1
    return PagedSequences(model, num_blocks).step({0: token_ids})[0]
