"""Link chasing: prompts whose greedy continuation is known exactly and hangs on every part of the transferred state.

A prompt is filler words with links ``nA>nB`` strewn among them, and ends in a node. Each generated token must be
the node that the last one links to, so that each decode step has to find one needle anywhere in the context. The
checkpoint that answers (``link_chasing_checkpoint``) serves each node from one *home*: one query head of one layer.
"""

from random import Random

import msgspec

NUM_NODES = 64
NUM_LAYERS = 4
NUM_HEADS = 8
NUM_KV_HEADS = 4
BLOCK_SIZE = 128

LOST, BOS, EOS = 0, 1, 2
"""``<lost>`` is the answer of a model that finds no link; ``<eos>`` is never an answer."""

_FILLER_WORDS = (
    "the a of and to in on at by for with from over under into after before while until near "
    "river stone window garden letter winter summer morning evening table bread water lamp road "
    "bridge harbor field forest mountain cloud rain wind silver copper quiet slow bright cold warm "
    "old young tall stays walks carries opens closes waits turns falls sings"
)
FILLERS = tuple(_FILLER_WORDS.split())
_FIRST_FILLER = 3
FIRST_NODE = _FIRST_FILLER + len(FILLERS)
FIRST_LINK = FIRST_NODE + NUM_NODES
VOCAB_SIZE = FIRST_LINK + NUM_NODES * NUM_NODES

MIN_TOKENS, MAX_TOKENS = 64, 100_000


class Home(msgspec.Struct, frozen=True, order=True):
    """Where the link of a node is found: global layer, query head, and the kv head that the query head reads."""

    layer: int
    q_head: int
    kv_head: int


class LinkChasingPrompt(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...]
    chain: tuple[int, ...]
    """Nodes (numbers, not token ids) of the one cycle; the prompt ends in ``chain[0]``."""

    @property
    def start(self) -> int:
        """Token id of the node that the prompt ends in."""
        return self.token_ids[-1]

    @property
    def text(self) -> str:
        """The same prompt for the checkpoint's tokenizer: words separated by one space."""
        return text_of(self.token_ids)

    def expected(self, num_tokens: int) -> tuple[int, ...]:
        """The first ``num_tokens`` token ids that a model with the whole state generates."""
        return tuple(node_token(self.chain[(step + 1) % len(self.chain)]) for step in range(num_tokens))

    def home(self, step: int) -> Home:
        """Who must find the token that is generated at ``step``; step 0 is the prefill worker's own."""
        return home(self.chain[step % len(self.chain)])


def home(node: int) -> Home:
    q_head = node // NUM_LAYERS % NUM_HEADS
    return Home(layer=node % NUM_LAYERS, q_head=q_head, kv_head=q_head * NUM_KV_HEADS // NUM_HEADS)


def node_token(node: int) -> int:
    return FIRST_NODE + node


def link_token(source: int, target: int) -> int:
    return FIRST_LINK + NUM_NODES * source + target


def vocabulary() -> list[str]:
    """Every word, at the index that is its token id."""
    nodes = [f"n{node}" for node in range(NUM_NODES)]
    return ["<lost>", "<bos>", "<eos>", *FILLERS, *nodes, *(f"{a}>{b}" for a in nodes for b in nodes)]


def text_of(token_ids: tuple[int, ...]) -> str:
    words = vocabulary()
    return " ".join(words[token] for token in token_ids)


def make_prompt(seed: int, num_tokens: int) -> LinkChasingPrompt:
    """The prompt of this seed and length, always the same. Raises ``ValueError`` for a length outside the limits."""
    if not MIN_TOKENS <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"a link-chasing prompt has {MIN_TOKENS} to {MAX_TOKENS:,} tokens, not {num_tokens}")
    random = Random(f"link chasing {seed} {num_tokens}")
    chain = _shuffled(random, range(NUM_NODES))[: min(NUM_NODES, max(2, num_tokens // 8))]
    tokens = [BOS, *(_FIRST_FILLER + int(random.random() * len(FILLERS)) for _ in range(num_tokens - 2))]
    tokens.append(node_token(chain[0]))
    successor = dict(zip(chain, chain[1:] + chain[:1], strict=True))
    for source, position in _place_links(random, chain, num_tokens).items():
        tokens[position] = link_token(source, successor[source])
    return LinkChasingPrompt(token_ids=tuple(tokens), chain=tuple(chain))


def _place_links(random: Random, chain: list[int], num_tokens: int) -> dict[int, int]:
    """A position for the link of each node.

    The links of one layer are spread evenly over all blocks but the last two (where there are more than two): with
    zeroed index keys all scores tie, and whichever fixed 15 blocks win must miss some link of every layer.
    """
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    num_usable = num_blocks - 2 if num_blocks > 2 else num_blocks
    taken: set[int] = set()
    positions: dict[int, int] = {}
    for layer in range(NUM_LAYERS):
        nodes = _shuffled(random, [node for node in chain if home(node).layer == layer])
        shift = random.random()
        for rank, node in enumerate(nodes):
            block = int((rank + shift) * num_usable / len(nodes))
            block_positions = range(max(2, block * BLOCK_SIZE), min((block + 1) * BLOCK_SIZE, num_tokens - 1))
            # The last of two blocks may be too small: then anywhere.
            free = [p for p in block_positions if p not in taken] or [
                p for p in range(2, num_tokens - 1) if p not in taken
            ]
            positions[node] = free[int(random.random() * len(free))]
            taken.add(positions[node])
    return positions


def _shuffled(random: Random, values: range | list[int]) -> list[int]:
    # Only random() itself promises the same numbers in every Python version.
    return sorted(values, key=lambda _: random.random())
