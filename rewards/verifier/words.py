"""English words in answers: numbers, and words that change a number or say nothing about it."""

from __future__ import annotations

import re

# Words in front of a number that say nothing about its value.
INTRODUCTION_WORDS = {
    *("there", "it", "the", "total", "value", "answer", "is", "are", "we", "get", "have", "has"),
    *("of", "a"),
}
# The value of number words. "second" is a unit of time.
NUMBER_WORDS = {
    **{"dozen": "12", "hundred": "100", "thousand": "1000", "million": "1000000"},
    **{"billion": "1000000000", "trillion": "1000000000000"},
    **{"half": r"\frac{1}{2}", "halve": r"\frac{1}{2}", "third": r"\frac{1}{3}"},
    **{"quarter": r"\frac{1}{4}", "fourth": r"\frac{1}{4}", "fifth": r"\frac{1}{5}"},
    **{"sixth": r"\frac{1}{6}", "seventh": r"\frac{1}{7}", "eighth": r"\frac{1}{8}"},
    **{"ninth": r"\frac{1}{9}", "tenth": r"\frac{1}{10}", "twelfth": r"\frac{1}{12}"},
    **{"hundredth": r"\frac{1}{100}", "thousandth": r"\frac{1}{1000}"},
    **{"millionth": r"\frac{1}{1000000}"},
}
LARGE_NUMBERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SMALL_NUMBER_NAMES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
"""
SMALL_NUMBERS = SMALL_NUMBER_NAMES.split()
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# Words that make the answer another one than the number in front of them.
MEANINGFUL_WORDS = {
    *SMALL_NUMBERS,
    *TENS,
    # connectives
    *("or", "and", "but", "nor", "to", "through", "until", "till", "between", "either", "both"),
    *("if", "unless", "when", "where", "while", "except", "excluding", "without", "with", "versus"),
    *("vs", "out", "from", "instead", "rather", "also", "else", "otherwise", "maybe", "perhaps"),
    *("possibly", "alternatively", "respectively", "then", "range", "excluded", "exclusive"),
    *("only", "onward", "onwards", "upward", "upwards", "downward", "downwards", "beyond"),
    # negations
    *("not", "no", "never", "neither", "none", "nothing", "isn't", "isnt", "aint", "ain't"),
    *("wrong", "incorrect", "false", "cannot", "can't", "impossible", "invalid", "non", "unequal"),
    *("unlikely", "extraneous", "opposite"),
    # comparisons
    *("more", "less", "fewer", "greater", "smaller", "larger", "least", "most", "than", "above"),
    *("below", "over", "under", "about", "around", "roughly", "approximately", "almost", "nearly"),
    # operations
    *("plus", "minus", "times", "divided", "multiplied"),
    *("by", "squared", "cubed", "raised", "root"),
    *("square", "cube", "factorial", "choose", "mod", "modulo", "negative", "double", "twice"),
    *("thrice", "triple", "doubled", "tripled", "halved", "halves", "inverse", "reciprocal"),
    *("conjugate", "imaginary", "reversed", "transposed", "transpose", "complement", "derivative"),
    *("integral", "added", "subtracted", "increased", "decreased", "off", "infinity", "e", "log"),
    # numbers in other bases and units of counting
    *("base", "binary", "octal", "hex", "hexadecimal", "ternary", "repeating", "recurring"),
    *("score", "pair", "pairs", "couple", "gross", "lakh"),
    *("lakhs", "scores", "crore", "permille", "mille", "permil", "nano"),
    *("micro", "milli", "centi", "kilo", "mega", "giga"),
}
# Ordinal and large numbers without an entry in NUMBER_WORDS: twentieths, quintillion.
NUMBER_ENDINGS = re.compile(r".*(?:(?:teen|ieth|dred|sand|ill?ion)(?:th)?s?|(?:[a-z]ieth)s?)")
# Words outside of `\text{}` with fewer than four letters. Others may be products of variables, such
# as `2 xy` and `2 abc`.
SHORT_WORDS = {
    *("a", "an", "the", "of", "in", "on", "at", "is", "are", "per", "odd", "old", "all", "red"),
    *("egg", "men", "man", "boy", "dog", "cat", "cup", "cow", "hen", "pen", "box", "bag", "car"),
    *("bus", "can", "jar", "job", "bed", "hat", "pie", "pig", "day", "way", "toy", "key", "row"),
    *("set", "die", "bat", "tie", "pea", "nut", "ant", "bee", "big", "new", "ten"),
}
