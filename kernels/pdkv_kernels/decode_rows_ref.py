"""What decode steps that follow one another keep of their sequences on the device, and what the host says of some.

Each sequence has a row. The host says what a row is when that changes, in memory that both see; a row of which it says
nothing goes on by itself, one token further with every step. So a step costs the host what has changed in it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkv_kernels.draw_ref import NUM_TOP, TEMPERATURE

END, START, BEHIND, GROWS, PAGES, TOKENS = 0, 1, 2, 3, 4, 5
"""Columns of what is said of a row: where its tokens end, from which position on they are stored, the row of the step
before whose choice is its last token (-1: it is among its tokens), 1 (0 in the row of no sequence), how many pages are
said with it (0: it keeps its page table; -1 - r: none of all this, it goes on as row r of the step before, with that
row's table), its tokens."""


@dataclass(frozen=True)
class RowBuffers:
    """Of up to ``most`` sequences. Halves are by turns of one step and the next: in one of them the host writes for a
    step while the device may still read the other."""

    said_at: Tensor  # int64 [2, most], host; the step of which the row's half says something, by its number
    said: Tensor  # int32 [2, most, TOKENS + longest], host
    said_pages: Tensor  # int32 [2, most, max_blocks], host
    said_asked: Tensor  # int64 [2, most, ASKED], host; what is asked of a row, as ``draw_ref`` has it
    step: Tensor  # int64 [1]; number of the next step to be computed
    numbers: Tensor  # int32 [2, most, PAGES]; the first columns, as the step of that half finds them
    asked: Tensor  # int64 [2, most, ASKED]; as the step of that half finds it
    tables: Tensor  # int32 [most, max_blocks]
    last: Tensor  # int64 [most]; what the latest step chose behind each row's last token
    told: Tensor  # int64 [2, 2, most * longest], host; what steps tell: tokens, and bits of their log-probabilities
    told_tops: Tensor  # int64 [2, most, 2, most_top], host; as ``draw_ref`` has it, of rows of which it is asked


@dataclass(frozen=True)
class RowInputs:
    """What a step computes: ``query_len`` rows of each sequence, end to end."""

    token_ids: Tensor  # int64 [batch * query_len]
    positions: Tensor  # int64 [batch * query_len]; negative where there is no token
    context_lens: Tensor  # int32 [batch]; tokens before the step's
    stored_from: Tensor  # int32 [batch]
    asked: Tensor  # int64 [batch, ASKED]


def begin_rows_ref(buffers: RowBuffers, batch: int, query_len: int) -> RowInputs:
    """What the step that ``buffers.step`` counts is of its first ``batch`` rows, and what the next one finds of them.

    Nobody goes on as a row that is said to go on as another, or that is said to have pages, in the same step.
    """
    half = int(buffers.step) % 2
    said = buffers.said[half, :batch].to(buffers.numbers.device)
    is_said = (buffers.said_at[half, :batch] == buffers.step.cpu()).to(said.device)
    pages = torch.where(is_said, said[:, PAGES], 0)
    own_rows = torch.arange(batch, device=said.device)
    source = torch.where(pages < 0, -1 - pages, own_rows)
    is_new = is_said & (pages >= 0)
    numbers = torch.where(is_new[:, None], said[:, :PAGES], buffers.numbers[half, source])
    for row in pages.nonzero().flatten().tolist():
        count = int(pages[row])
        if count < 0:
            buffers.tables[row] = buffers.tables[-1 - count]
        else:
            buffers.tables[row, :count] = buffers.said_pages[half, row, :count].to(said.device)
    said_asked = buffers.said_asked[half, :batch].to(said.device)
    asked = torch.where(is_new[:, None], said_asked, buffers.asked[half, source])
    buffers.asked[1 - half, :batch] = asked
    tokens = torch.where(is_new[:, None], said[:, TOKENS : TOKENS + query_len], 0).long()
    behind = numbers[:, BEHIND].long()
    tokens[:, -1] = torch.where(behind >= 0, buffers.last[behind.clamp(min=0)], tokens[:, -1])
    ends = numbers[:, END]
    positions = ends[:, None].long() + torch.arange(-query_len, 0, device=said.device)
    after = buffers.numbers[1 - half, :batch]
    after.copy_(numbers)
    after[:, END] += numbers[:, GROWS]
    after[:, START] += numbers[:, GROWS]
    after[:, BEHIND] = own_rows.to(torch.int32)
    return RowInputs(tokens.flatten(), positions.flatten(), ends - query_len, numbers[:, START].clone(), asked)


def end_rows_ref(buffers: RowBuffers, chosen: Tensor, batch: int, query_len: int) -> None:
    """Keep what the step has chosen for the next one, tell it to the host, and count the step.

    chosen: int64 [3, batch * query_len]: tokens, tokens as they are told, bits of log-probabilities in float64.
    """
    half = int(buffers.step) % 2
    buffers.last[:batch] = chosen[0, query_len - 1 :: query_len]
    buffers.told[half, :, : batch * query_len].copy_(chosen[1:])
    buffers.step.add_(1)


def retell_rows_ref(buffers: RowBuffers, chosen: Tensor, tops: Tensor, asked: Tensor) -> None:
    """Behind ``end_rows`` of a step of one row each, keep and tell what has been drawn since, of rows that ask for it.

    chosen: int64 [3, batch], as ``end_rows`` takes it; tops: int64 [batch, 2, most_top]; asked: int64 [batch, ASKED].
    """
    half = (int(buffers.step) - 1) % 2
    is_drawn = asked[:, TEMPERATURE].contiguous().view(torch.float64) > 0
    drawn = is_drawn.nonzero().flatten()
    buffers.last[drawn] = chosen[0, drawn]
    buffers.told[half][:, drawn.cpu()] = chosen[1:, drawn].to(buffers.told.device)
    told = (asked[:, NUM_TOP] > 0).nonzero().flatten()
    buffers.told_tops[half, told.cpu()] = tops[told].to(buffers.told.device)
