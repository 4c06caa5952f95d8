"""Seeded prompts of a wanted length in tokens.

Prompts are random common words, so that no two share more than their first word and no prefix cache helps
unless `--shared-prefix` asks for it. Where the server can count tokens, the words that are not exactly one
token behind a space are left out, and the length is exact; what is left is then a matter of arithmetic:

    tokens = overhead + number of words        overhead: special tokens, and what the first word costs more

Where too few words survive (a small vocabulary), or the server cannot count, the length is about right.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

CountTokens = Callable[[str], Awaitable[int | None]]

MIN_WORDS = 50  # fewer would make prompts too alike
LEAD = "the"  # stands before every word whose length is asked for

_WORD_LIST = """
able about above accept across action active actual after again against agent allow almost alone along
already also always among amount animal another answer appear apply area around array assert attempt author
back base before begin behind below best better between block board body book both bottom bound branch break
bring buffer build button call care carry case cause cell center certain chain chance change channel char
check child choice city class clean clear client close code color column come common compare complete config
connect contain content context control copy correct cost could count country course cover create current
custom cycle data date deal debug decide deep default define delete depend derive design detail device
differ digit direct disk display divide document does domain double down draw drive drop each early easy
edge effect either element else empty enable encode end engine enough enter entry equal error even event
ever every exact example except exist exit expect export extend extra face fact fail fall false family far
fast father feature feed feel field figure file fill filter final find fine first five fix flag float flow
follow food force form format forward found four frame free from front full function future garden gather
gave general get give given glass global go good graph great green ground group grow half hand handle happen
hard hash have head header hear heart heat heavy help here hidden high hold home host hour house human
hundred idea ignore image import include index info inner input insert inside instance instead int invalid
issue item iterate join just keep key kind know label land language large last late later layer lead learn
least leave left length less letter level library light like limit line link list listen little live load
local lock log logic long look loop loss lost low machine made main make manage many map mark master match
matter maximum may mean measure member memory message method middle might mind minimum minute mode model
module moment money month more morning most mother mount move much music must name near need network never
new next night no node none normal north note nothing notice number object offset often old once only open
operator option order original other outer output over own pack page pair paper parameter parent parse part
pass path pattern people percent period person phase pick piece place plan plant platform play point policy
pool port position possible power present press prevent price print private problem process produce product
program proper protocol provide public pull purpose push question queue quick quite raise random range rate
reach read ready real reason record red reduce region register release remain remote remove repeat replace
report request require reset resource response rest result return right river road role room root round row
rule run same sample save scale scan school science scope score sea search second section see select self
send sense sequence server set seven shape share short should show side sign signal similar simple since
single six size skip sleep slow small social some sort source south space speak special speed split square
stack stage stand standard start state step still stop store story stream street string strong structure
study style such support sure switch symbol system table take target task teach team ten term test text than
that their them then there these they thing think third this those thousand thread three through time title
today together token top total touch toward town trace track transfer tree true try turn two type under unit
until update upon use user valid value vector version very view voice wait walk want warm watch water way
week weight well were west what when where which while white whole why wide will wind window wish with
within word work world would write wrong year yes young zero
"""

WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())


@dataclass(frozen=True, slots=True)
class Prompter:
    """Makes texts of a wanted number of tokens."""

    words: tuple[str, ...]
    tokens_per_word: float
    overhead: int
    is_exact: bool

    def text(self, tokens: int, key: str, *, shared: int = 0, shared_key: str = "") -> str:
        """`shared` tokens that are the same for one `shared_key`, then `tokens` of this `key`'s own."""
        words = [self.words[0]]
        head = self._num_words(shared - self.overhead) - 1 if shared else 0
        words += random.Random(f"shared/{shared_key}").choices(self.words, k=max(0, head))
        rest = self._num_words(shared + tokens - self.overhead) - len(words)
        words += random.Random(f"own/{key}").choices(self.words, k=max(0, rest))
        return " ".join(words)

    def _num_words(self, tokens: int) -> int:
        return max(1, round(tokens / self.tokens_per_word))


async def calibrate(count: CountTokens | None, words: Sequence[str] = WORDS) -> Prompter:
    """Ask the server how long words are; without a `count`, take a word for a token."""
    guess = Prompter(tuple(words), 1.0, 0, is_exact=False)
    alone = await count(LEAD) if count else None
    if count is None or alone is None:
        return guess

    async def cost(group: Sequence[str]) -> int:
        whole = await count(" ".join([LEAD, *group]))
        return len(group) if whole is None else whole - alone  # no answer: no reason to split it

    single = await _single(cost, words)
    if len(single) < MIN_WORDS:
        return Prompter(tuple(words), max(1.0, await cost(words) / len(words)), 0, is_exact=False)
    whole = await count(" ".join(single))
    if whole is None:
        return guess
    return Prompter(tuple(single), 1.0, whole - len(single), is_exact=True)


async def _single(cost: Callable[[Sequence[str]], Awaitable[int]], words: Sequence[str]) -> list[str]:
    """The words that are one token behind a space.

    A word is at least one token, so a group whose sum is its size is clean. Groups are halved only while
    they are not, which takes few questions.
    """
    if await cost(words) == len(words):
        return list(words)
    if len(words) == 1:
        return []
    middle = len(words) // 2
    return await _single(cost, words[:middle]) + await _single(cost, words[middle:])
