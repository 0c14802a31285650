"""How likely each of some answers is. The numbers are exact: one pass over the prompt, each answer behind it by itself.

python examples/score.py [MODEL]
"""

import sys

from mtllama import load_model

m = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")

review = "a film made with as little wit and interest as possible. Would the writer recommend it?"
found = m.score(review, ["Yes", "No"])
for choice, chance in zip(found.choices, found.probabilities, strict=True):
    print(f"{choice.text:4} {choice.sum:8.3f} nat  {choice.per_char:7.3f} a character  {chance:6.1%}")
print("best:", found.best.text)
