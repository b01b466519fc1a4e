"""Drive the model chunk by chunk over an arena whose pages lie in disorder and are full of NaN to begin with."""

import torch

from pdkv.m3.config import kv_layout
from pdkv.m3.decode_graphs import MAX_QUERY_LEN
from pdkv.m3.model import M3Model, StepBatch
from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout


class PagedRun:
    """One sequence: its pages, and how many of its tokens they hold; of one rank where the model is divided."""

    def __init__(
        self, model: M3Model, max_tokens: int, seed: int = 0, kv_dtype: str = "float32", index_dtype: str = ""
    ) -> None:
        """``index_dtype``: that of K/V where it is not given."""
        self.model = model
        self.num_tokens = 0
        num_blocks = -(-max_tokens // model.config.block_size)
        layout = RowLayout.of(
            kv_layout(model.config, kv_dtype, index_dtype or kv_dtype), model.group.rank, model.group.size
        )
        self.arena = Arena.allocate(layout, num_blocks + 3, model.device)
        for region in self.arena.regions():
            self.arena.view(region.name, region.layer).fill_(torch.nan)
        order = torch.randperm(num_blocks + 3, generator=torch.Generator().manual_seed(seed))
        self.page_table = order[None, :num_blocks].int().to(model.device)

    def feed(self, token_ids: list[int], rows: list[int] | None = None) -> torch.Tensor:
        """One step; logits of the given rows, of the last without them: [num_rows, vocab]."""
        count = len(token_ids)
        device = self.model.device
        batch = StepBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.arange(self.num_tokens, self.num_tokens + count, device=device),
            query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
            context_lens=torch.tensor([self.num_tokens], dtype=torch.int32, device=device),
            page_table=self.page_table,
            logits_rows=torch.tensor([count - 1] if rows is None else rows, dtype=torch.int64, device=device),
            query_len=count if count <= MAX_QUERY_LEN else 0,
        )
        logits = self.model.forward(batch, self.arena)
        self.num_tokens += count
        return logits

    def prefill(self, token_ids: list[int], chunk: int) -> torch.Tensor:
        """Logits behind the last token: [vocab]."""
        last = (len(token_ids) - 1) // chunk * chunk
        for begin in range(0, last, chunk):
            self.feed(token_ids[begin : begin + chunk], [])
        return self.feed(token_ids[last:])[0]

    def greedy(self, prompt: list[int], num_tokens: int, chunk: int) -> tuple[list[int], torch.Tensor]:
        """Tokens, and the logits that gave them: [num_tokens, vocab]."""
        rows = [self.prefill(prompt, chunk)]
        tokens = [int(rows[-1].argmax())]
        while len(tokens) < num_tokens:
            rows.append(self.feed(tokens[-1:])[0])
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.stack(rows)
