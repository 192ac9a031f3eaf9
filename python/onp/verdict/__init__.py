"""Is there a backdoor? Four independent findings from clean data; any one of them calls it.

**Norm statistics.** The moments that the batch norms remember differ from the clean images' by more
than chance, and triggers that are learned to explain the difference, no class being asked for, make
the network answer one class:

    score = mean of the excess and of the share of images that go to that class, each scaled,
            less the larger a patch has to be for what it explains of that excess

The share is a mean over all triggers, 0 for those that answer another class; where images come to
two or three classes, that of these together. What noise makes of
the moments takes a large trigger to explain, an attacker's a small one.

If no one class: a trigger that shifts all labels by one and explains the difference (all-to-all),
against one that shifts them by two; then the lesser of its share and its advantage counts.

**Looks.** Triggers of three families are synthesised for every class, in a few steps. One that
matches no attack finds a natural adversarial direction, and every class has some; so a backdoor is
called where the best trigger that works on half of the images leads the same family's for every
other class: it is smaller, or works better. More steps tell less, as natural directions catch up.

    score = that lead, scaled

**Squares.** The same lead among opaque squares of one place, that of the image where it is
largest: what a few steps of them reach there for other classes says how far a natural direction
leads (``onp.probes.square``). Where one draw speaks for a class, the mean of three decides. And
squares that shift all labels by one, against those that shift them by two (all-to-all): natural
directions lead to a class, and shift those of one label at most. And squares that lead each class's
images away: where those of most come to the same class, or those of one class to another where no
other's leave (a trigger may work on one class alone).

**Margins.** How sure of each class the network can be made, by any image at all, leads that of all
other classes, in logits and as a multiple of how sure it is of the class's clean images
(``onp.probes.margin``).

Where classes are few, one leads by chance: more is asked then. What unlearning leaves, and whether
a trigger's success can be pruned away, tell next to nothing beside a lead (bench/NOTES.md, "A lead
over near classes").
"""

from onp.verdict.finding import (
    MANY_CLASSES,
    Ground,
    Verdict,
    also_called,
    as_sure,
    beyond_doubt,
    named,
)
from onp.verdict.looks import by_looks
from onp.verdict.margins import by_margins
from onp.verdict.norms import also_answered, by_label_shift, by_statistics, target_of
from onp.verdict.squares import by_departures, by_shifting_squares, by_squares

__all__ = [
    "MANY_CLASSES",
    "Ground",
    "Verdict",
    "also_answered",
    "also_called",
    "as_sure",
    "beyond_doubt",
    "by_departures",
    "by_label_shift",
    "by_looks",
    "by_margins",
    "by_shifting_squares",
    "by_squares",
    "by_statistics",
    "named",
    "target_of",
]
