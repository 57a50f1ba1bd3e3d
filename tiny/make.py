"""Write tokenizer.json and config.json of the embedded model of 1.4 M: `python -m tiny.make`.

Its words are those of the benchmark's templates and names, digits, colours, simple shapes and
punctuation; any other word becomes <unk>. The prompt's two constant pieces are one token each.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from common.model.openvla import PROMPT

WORDS = """
a an the it s this that is so be should can could would you please and then to on onto over of in
into from at for where with put place set move take pick up down make sure surface table lay
position atop arrange resting placed carrot kitchen shovel bread plastic bottle 7up zuchinni
zucchini ketchup watering pipe toy bear fast food cup plant banana hamburger golf ball bbq sauce
travel pepper nonstop potato baguette champagne glass spoon onion plate cloth carpet newspaper sheet
metal drawing tablet tomato slice pizza flat bowl gramophone disk frying pan mouse pad cutting chess
board manhole cover envelope notepad red green blue yellow orange purple pink brown black white gray
grey cyan magenta teal violet navy olive beige gold silver light dark bright small big large tall
short long thin thick wide round square cube box block brick cuboid sphere cylinder cone capsule rod
bar stick ring disc tray mat dish saucer towel napkin book eggplant corn apple lemon lime pear peach
plum egg mushroom cucumber eraser marker candle dice die peg stone bell object hexagon octagon oval
ellipse triangle pyramid wedge prism rectangle strip slab tile coaster lid basket 0 1 2 3 4 5 6 7 8
9 . , ? ! : ; - ’ ' / ( ) soda sponge chocolate gift milk hot dog toothpaste jar door record brush
tape key
"""
# Action ids are BASE-256 .. BASE-1, padding is BASE: the published layout, which has 32000
BASE = 512


def main(folder=Path(__file__).parent):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*PROMPT.split("{}"), *WORDS.split()]:
        vocab.setdefault(piece, len(vocab))
    assert len(vocab) <= BASE - 256, len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in PROMPT.split("{}")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "openvla",
        "vision_backbone_id": "conv-stem",
        "camera_size": [80, 60],  # pixels; pictures of another size are refused
        "stem": [[64, 4, 4], [128, 3, 2], [128, 3, 2]],  # to 5 x 4 tokens: channels, kernel, stride
        "stem_blocks": [4, 256, 3],  # on the image tokens: heads, MLP width, number of blocks
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "text_config": {
            "vocab_size": BASE + 64,
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.08,  # about 1 / sqrt(hidden_size); with 0.02 it hardly learns
            "pad_token_id": BASE,
        },
        "value_head": [128, 64],
        "attention": "eager",  # on a CPU faster than "sdpa" with bfloat16, equal with float32
        "norm_stats": {
            "bridge_orig": {
                "action": {
                    "mask": [True] * 6 + [False],
                    "q01": [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715,
                            -0.08092105075716972, -0.09288699507713317, -0.20718276381492615, 0.0],
                    "q99": [0.028309678435325586, 0.040855254605412394, 0.040161586627364146,
                            0.08192047759890528, 0.07792850524187081, 0.20382574498653397, 1.0],
                }
            }
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
