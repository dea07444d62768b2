#!/usr/bin/env python3
"""Token ids of many strings, for tests/unit/test_tokenizers.c.

    python make_text_goldens.py ops/demo/model text.json

CLIP ids come from the class that FluxPipeline loads; T5 ids from spiece.model itself, with t5_ids_transformers where
the class that FluxPipeline loads differs (it does where text spells a special token), but for ties: there two ways to cut
the same text are as good, SentencePiece's float32 sums take either, and the class's is the one.
Every string is there whole; "padded" adds the ids as the pipeline asks for them, cut and padded to max_length.
"""
import json
import random
import sys

import sentencepiece
from transformers import CLIPTokenizer, T5TokenizerFast

HAND = [
    "\0", "a\0b", "\x01\x02\x1b[31mred\x7f", "\x1c\x1d\x1e\x1f", "\u0085next\u0085line", "\ufeffbom", "\u200e\u200fmarks", "soft\u00adhyphen",
    "\u2028line\u2029paragraph", "\u3000ideographic\u3000space", "\u1680ogham\u180emongolian", "tab\tnew\nreturn\rfeed\fvertical\v",
    "e\u0301 \u00e9 E\u0301 \u00c9", "a\u0323\u0301 a\u0301\u0323", "\u212b \u00c5 A\u030a", "\u2126 ohm \u212a kelvin", "\u1e9b\u0323", "\u0958 \u0915\u093c",
    "\u1100\u1161\u11a8 \uac01", "\uac00\u11a8", "\uf900 \u8c48", "q\u0307\u0323\u0301", "\u0344 \u0340 \u0341", "\u0f73\u0f75\u0f81", "\u0301leading mark",
    "x" + "\u0301\u0323\u05b0\u0345" * 20, "\U0001d400\U0001d7d8 math", "\U0001f468\u200d\U0001f469\u200d\U0001f467 family", "\U0001f1e9\U0001f1ea flag", "1\ufe0f\u20e3 keycap",
    "\u2764\ufe0f red heart", "\U0001f600" * 30, "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", "\u304b\u3099 \u30cf\u309a \uff76\uff9e", "\u4e2d\u6587\uff0c\u6807\u70b9\u3002", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0e44\u0e17\u0e22\u0e20\u0e32\u0e29\u0e32", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0661\u0662\u0663", "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947 \u096f", "\u0393\u03b5\u03b9\u03ac \u03a3\u039f\u03a6\u039f\u03a3", "\u041f\u0440\u0438\u0432\u0435\u0442 \u041c\u0418\u0420",
    "\u0130 \u0131 I i", "\u01c5 \u01c4 \u01c6", "\u1e9e \u00df SS", "\u10a0\u10d0 \u1c90", "\u13a0\uab70", "\u2160 \u2170 \u24b6 \u24d0", "\u00bd \u00b2 \u00b3 \u2460 \u3007", "12345 3.14159 1,000,000 0x1F",
    "'s", "'S", "it'S", "I'LL WE'VE", "'re'd'm'll", "!'s", "\u2019s", "''s", "'sunny'", "don''t", "'t'is", "a's b's", "'", "''", "'''",
    "<|endoftext|>", "<|startoftext|><|endoftext|>", "<|ENDOFTEXT|>", "<|EndOfText|> x", "<|endoftext", "<|endoftext|", "<<|endoftext|>>", "<|start<|endoftext|>oftext|>",
    "<|endoftext|><|endoftext|>", " <|startoftext|> ", "<|end\u00a0oftext|>", "</w>", "a</w>", "<unk>", "<pad>x", "<extra_id_0>", "<extra_id_99> y", "</s>", "\u2581", "a\u2581b", "\u2581\u2581",
    "   ", "\n\n\n", " a", "a ", " a ", "a  b", "a\u00a0\u00a0b", "  \u3000 a", "-", "--", "---", ",", ",,", "?!", "...", "\u2026", "$%^&*()", "http://example.com/a?b=c&d=e#f", "me@example.com",
    "C:\\path\\file.txt", "snake_case camelCase kebab-case", "#hashtag @mention", "(a:1.2), [b], {c|d}", "a/b|c\\d", "50% off!!!", "12th 1st 2nd", "3x3", "b4 l8r", "\u20ac5 \u00a36 \u00a57",
    "the quick brown fox jumps over the lazy dog", "THE QUICK BROWN FOX", "ThE qUiCk BrOwN", "pneumonoultramicroscopicsilicovolcanoconiosis", "a" * 300, "ab" * 200, "!" * 300, "9" * 100, "\u00e9" * 100,
    "\u65e5" * 100, "a\u0301" * 100, "red " * 200, "red, " * 120, "\ufb03 \ufb06 \u0132 \u01f1", "\u2122 \u00ae \u00a9 \u2120", "\uff28\uff25\uff2c\uff2c\uff2f \uff11\uff12", "\u338f \u3392 \u33a5", "\ufdfa",
    "..!'!btaao!-eec0s0ss 0'o!-das,.'.0!!oca,o000c ",  # many ties
    "\ufffd", "\ufffe\uffff", "\U0010ffff", "\ue000 private", "\U000e0041 tag", "\u2066isolate\u2069", "x\u20dd", "\u0360\u0361 \u035c", "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324\u031e\u0349\u035a\u032f\u031e\u0320\u034dA\u036b\u0357\u0334\u0362\u0335\u031c\u0330\u0354L\u0368\u0367\u0369\u0358\u0320G",
]
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz     ", "ABCXYZabcxyz  '''.,!?-_", "0123456789 abc.,%", "'srtvelmd ", "<|>endoftxsar ", "\t\n\r \u00a0\u2003\u3000ab",
    "\u00e0\u00e9\u00ee\u00f5\u00fc\u00df\u00d8\u00c6 ab", "\u0391\u03b1\u03a3\u03c3\u03c2 \u0416\u0436\u0419\u0439", "\u65e5\u672c\u8a9e\u4e2d\u6587 \u3042\u30a2\u304c\u304b\u3099", "\uac00\ub098\u1100\u1161\u11a8 ", "\U0001f600\U0001f680\u200d\ufe0f\U0001f3fd a",
    "ao\u0300\u0301\u0302\u0323\u0327\u0328\u0345", "\u0915\u093c\u094d\u0947\u0928 ", "\x00\x01\x07\x1b\x7f\x80\x9f a", "\u2581</s><pad> a", "redbluegrncilsqat  ",
]
WORDS = ("a the red blue green yellow purple white black large small tiny HUGE circle square triangle star ring cross heart diamond above below left of right "
         "in corner on background stripes, checkered gradient: it's don't three 3 2nd caf\u00e9 na\u00efve blue-to-white <|endoftext|> \u2764 shapes! (and) \"quoted\"").split()


def strings():
    rng = random.Random(20)
    yield from HAND
    for alphabet in ALPHABETS:
        for _ in range(10):
            yield "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40)))
    for _ in range(60):
        yield rng.choice([" ", " ", "  ", ""]).join(rng.choice(WORDS) for _ in range(rng.randint(1, 25)))
    everything = "".join(ALPHABETS)
    for _ in range(60):
        yield "".join(rng.choice(everything) for _ in range(rng.randint(1, 60)))


def main(model, path):
    clip, t5 = CLIPTokenizer.from_pretrained(model + "/tokenizer"), T5TokenizerFast.from_pretrained(model + "/tokenizer_2")
    sp = sentencepiece.SentencePieceProcessor(model_file=model + "/tokenizer_2/spiece.model")
    lines, differ = [], 0
    for i, s in enumerate(strings()):
        theirs = t5(s).input_ids
        tie = "".join(map(sp.id_to_piece, sp.encode(s) + [1])) == "".join(t5.convert_ids_to_tokens(theirs))
        row = {"text": s, "clip_ids": clip(s).input_ids, "t5_ids": theirs if tie else sp.encode(s) + [1]}
        if theirs != row["t5_ids"]:
            row["t5_ids_transformers"], differ = theirs, differ + 1
        if i % 12 == 0:
            cut = dict(padding="max_length", truncation=True)
            row["padded"] = [{"max_length": n, "clip_ids": clip(s, max_length=n, **cut).input_ids,
                              **({} if "t5_ids_transformers" in row else {"t5_ids": t5(s, max_length=n, **cut).input_ids})} for n in (2, 5, 77)]
        lines.append(json.dumps(row, separators=(",", ":")))
    with open(path, "w") as f:
        f.write("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{len(lines)} strings; sentencepiece and transformers differ on {differ}")


if __name__ == "__main__":
    main(*sys.argv[1:])
