"""Foreign weights <-> ours, in both directions: text LMs and HuBERT by the tables of families.py.

    folder --files.open_tensors--> {their name: tensor} --rows of the family's table--> {our name: tensor}, one at a time

Every foreign tensor is consumed by a row or listed as dropped on purpose; anything else is an error that names it.

Sources: tensor names of the Hugging Face releases, slamkit's wrapper of a unit LM, fairseq's HuBERT checkpoints.
"""
import ast
import re
from pathlib import Path

import torch

from checkpoints import download, families, files
from checkpoints.families import FAIRSEQ_NAMES, FAMILIES, HUBERT_CONFIG, HUBERT_FIXED, HUBERT_ROWS, POS_CONV
from checkpoints.recognise import UNQUANTISED, WANTED, check_values, meant, sound

SIZES = tuple("vocab_size block_size n_layer n_head n_kv_head n_embd head_dim n_inner pos_kernel pos_groups".split())
MOST_LAYERS, LARGEST_SIZE = 1000, 2**24  # beyond what exists: a damaged config must not fill the memory
QUANTISED = re.compile(r".*[._](qweight|qzeros|g_idx|absmax|SCB|scales|weight_scale(_inv)?|weight_packed|quant_state\..*)")
UNIT_LM = "speech_language_model"  # model_type of slamkit's wrapper around a text LM's network
SHIPPED = Path(__file__).parent.parent / "configs" / "lms"  # config.json of published text LMs, as ORG--NAME.json


def shipped(name):
    """The file of configs/lms/ that stands in for the config.json of org/name; None: there is none, or the model is here."""
    file = SHIPPED / f"{str(name).replace('/', '--')}.json"
    if not file.is_file() or Path(name).exists() or any(map(download.complete, download.places(name))):
        return None
    return file


def find_settings(name, kind):
    """(config.json of a model, where it is): the architecture alone, for which a published text LM need not be fetched."""
    if kind == "lm" and (file := shipped(name)):
        files.note(f"--lm={name}: not here; its shape is read from configs/lms/{file.name}, and weights are not needed")
        return read_settings(file), file
    folder = files.find_model(name, kind)
    return read_settings(folder), folder


def read_settings(folder):
    """config.json of a model folder, or that file under another name.

    slamkit's wrapper is taken off: the network of `base_config` with the outer vocabulary.

    The table was resized after the inner config was written, so the inner vocab_size may still be the text model's.
    """
    settings = files.read_json(folder if Path(folder).is_file() else Path(folder) / "config.json")
    check_values(settings, {"model_type": str, "vocab_size": int, "base_config": dict}, folder)
    if any(settings.get(key) for key in ("quantization_config", "quantization", "compression_config")):
        raise ValueError(f"{folder} holds quantised weights, as its config.json says; {UNQUANTISED}")
    if settings.get("model_type") != UNIT_LM:
        return settings
    base = settings.get("base_config")
    if not base or not settings.get("vocab_size"):
        raise ValueError(f"{folder}: config.json of a {UNIT_LM} lacks base_config or vocab_size; copy it again")
    return {**base, "vocab_size": settings["vocab_size"], "wrapper": UNIT_LM}


def open_lm(folder):
    """Returns (family name, keyword arguments of TransformerConfig, {our name: tensor as stored}, read when it is asked for)."""
    family, architecture = lm_architecture(read_settings(folder), folder)
    return family, architecture, translate(files.open_tensors(folder), FAMILIES[family], architecture, folder)


def lm_architecture(settings, where="config.json"):
    """config.json of a text LM -> (family name, keyword arguments of TransformerConfig)."""
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{where}: model_type {family!r} is not supported; known are {', '.join(FAMILIES)}"
                         + meant(settings, "lm")
                         + "; of several models in one, give the text model alone" * ("text_config" in settings))
    table = FAMILIES[family]
    keys = {**table.keys, **{other: table.keys[key] for other, key in table.aliases.items()}}
    kinds = {key: families.KINDS.get(ours, bool) for key, ours in keys.items()}
    check_values(settings, families.OTHER_KINDS | kinds, f"{where}/config.json")
    try:
        architecture = read_architecture(table, settings)
    except KeyError as error:
        raise ValueError(f"{where}: config.json lacks {error} which a {family} model needs") from None
    check_sizes(architecture, {ours: key for key, ours in keys.items() if key in settings}, where)
    return family, architecture


def check_sizes(architecture, keys, where):
    """Raises ValueError for a size that no model has. keys: {our name: theirs}."""
    for name in SIZES:
        size, largest = architecture.get(name, 1), MOST_LAYERS if name == "n_layer" else LARGEST_SIZE
        if type(size) is not int or not 1 <= size <= largest:
            raise ValueError(f"{where}: {keys.get(name, name)} is {size!r:.40}, expected a whole number from 1 to {largest}")


def demand(settings, values, where):
    """Raises ValueError where a setting that would change the network has another value than the one that we compute."""
    for key, value in values.items():
        if settings.get(key, value) not in (value, None):
            raise ValueError(f"{where}: {key} = {settings[key]!r} is not supported, expected {value!r}")


def read_architecture(family, c):
    """Their config -> keyword arguments of TransformerConfig, by the family's table. Where there is a default, null means it."""
    demand(c, family.demanded, "config.json")
    given = {**{key: c[other] for other, key in family.aliases.items() if other in c}, **c}
    given |= {key: value for key, value in family.defaults.items() if given.get(key) is None}
    found = {**family.fixed, **family.derive(c)}
    for theirs, ours in family.keys.items():
        if ours not in found:
            if given[theirs] is None and theirs not in family.defaults:
                raise KeyError(theirs)
            found[ours] = families.READ[ours](theirs, given[theirs]) if ours in families.READ else given[theirs]
    usual = dict(n_kv_head=found["n_head"], head_dim=found["n_embd"] // max(1, found["n_head"]), n_inner=4 * found["n_embd"],
                 embed_dim=found["n_embd"])
    found |= {name: found.get(name) or value for name, value in usual.items()}
    return {"out_bias": found["attention_bias"], **found}


def write_lm(family, architecture, tensors):
    """The reverse of open_lm: (their config.json, {their name: tensor})."""
    table = FAMILIES[family]
    keys = {theirs: families.WRITE.get(ours, lambda value: value)(architecture[ours]) for theirs, ours in table.keys.items()}
    settings = {"architectures": [table.class_name], "model_type": family,
                **{key: value for key, value in keys.items() if value is not None}, **table.extra}
    return settings, write_rows(table.rows, architecture, tensors)


def full_name(name, family):
    """Their name as the newest files spell it: without slamkit's `lm.`, with the family's prefix."""
    name = name.removeprefix("lm.")
    if name in ("lm_head.weight", "embed_out.weight"):
        return family.head
    return name if name.startswith(family.prefix) else family.prefix + name


def unwrapped(names, known, where):
    """{name: stored name}, without what wrappers put before every name: what stands there before a name that is known.

    slamkit's `lm.` and the `hubert.` of models with a head are read by those who call this.
    """
    copies = [name.removesuffix(known) for name in names if name == known or name.endswith(f".{known}")]
    if len(copies) > 1:
        raise ValueError(f"{where} holds {known} under {copies}, so copies of a model; save the one that is meant alone")
    before = "".join(copies)
    if before in ("", "lm.", "hubert.") or not all(name.startswith(before) for name in names):
        return {name: name for name in names}
    files.note(f"{where}: {before}{known} is taken as {known}, and every other name likewise")
    return {name.removeprefix(before): name for name in names}


def translate(source, family, architecture, where):
    """{their name: tensor} -> {our name: tensor}: read when it is asked for, so one at a time, and perhaps a view of the file.

    Every tensor of theirs is consumed or dropped on purpose; the names are checked here, before anything is read.
    source: best files.open_tensors, whose dtypes stay.
    """
    stored = unwrapped(source, family.rows[0].theirs[0], where)
    names = {full_name(name, family): stored[name] for name in stored}
    if architecture["tie_embeddings"] and family.head in names:  # a second copy of the embedding table, or the only one
        head, table = names.pop(family.head), family.rows[0].theirs[0]
        if not torch.equal(source[names.setdefault(table, head)], source[head]):
            raise ValueError(f"{where}: config.json says tie_word_embeddings, but {head} is another matrix than {names[table]}: "
                             "set tie_word_embeddings to false to use both, or delete the first")
    names = {name: stored for name, stored in names.items() if not re.fullmatch(family.dropped, name)}

    def read(_, place):
        row, stored = place
        parts = [sound(source[name], name, where) for name in stored]
        try:
            return row.layout.read(parts, architecture)
        except RuntimeError:
            shapes = " and ".join(f"{name} {tuple(part.shape)}" for name, part in zip(stored, parts))
            raise ValueError(f"{where}: {shapes} do not fit config.json; they belong to different models") from None

    return files.Lazy(fit(family.rows, architecture, names, where), read)


def expand(rows, architecture):
    """Every (row, layer) of a model of this architecture, layer after layer, as shards store them; None outside the stack."""
    def count(row):  # HuBERT's front end has as many layers as convolutions
        return len(architecture["conv_dim"]) if row.ours.startswith("convs.") else architecture["n_layer"]

    rows = [row for row in rows if row.when(architecture)]
    stack = [row for row in rows if "{}" in row.ours]
    for row in rows:
        if row not in stack:
            yield row, None
        elif row is stack[0]:
            for layer in range(max(map(count, stack))):
                yield from ((other, layer) for other in stack if layer < count(other))


def fit(rows, architecture, stored, where):
    """{their name: anything} -> {our name: (row, [what is stored under the row's names])}; both must be complete."""
    left, fitted, missing = dict(stored), {}, []
    for row, layer in expand(rows, architecture):
        names = [template.format(layer) for template in row.theirs]
        missing += [name for name in names if name not in left]
        fitted[row.ours.format(layer)] = row, [left.pop(name) for name in names if name in left]
    if quantised := next(filter(QUANTISED.fullmatch, left), None):
        raise ValueError(f"{where} holds quantised weights ({quantised}); {UNQUANTISED}")
    if missing or left:
        left = sorted(place if isinstance(place, str) else name for name, place in left.items())  # as the file calls them
        missing, left = (f"{names[:3] or 'none'}{' ...' if len(names) > 3 else ''}" for names in (missing, left))
        raise ValueError(f"{where}: the weights do not fit their config; missing {missing}, unexpected {left}")
    return fitted


def write_rows(rows, architecture, tensors):
    """The reverse: {our name: tensor} -> {their name: tensor}."""
    left, theirs = dict(tensors), {}
    for row, layer in expand(rows, architecture):
        parts = row.layout.write(left.pop(row.ours.format(layer)), architecture)
        theirs.update(zip((template.format(layer) for template in row.theirs), parts))
    assert not left, f"tensors without a row in the table: {sorted(left)[:3]}"
    return theirs


def read_hubert(path):
    """A Hugging Face HuBERT folder or a fairseq .pt file -> (keyword arguments of HubertConfig, {our name: tensor})."""
    path = Path(path)
    architecture, tensors = hugging_face_hubert(path) if path.is_dir() else fairseq_hubert(path)
    check_sizes(architecture, {ours: key for key, ours in HUBERT_CONFIG.items()}, path)
    if any(architecture["n_embd"] % architecture[part] for part in ("n_head", "pos_groups")):
        raise ValueError(f"{path}: its width cannot be divided by its number of heads or of groups in the positional convolution")
    convs = [architecture[f"conv_{part}"] for part in ("dim", "kernel", "stride")]
    if len(set(map(len, convs))) > 1 or not all(map(all, convs)):
        raise ValueError(f"{path}: conv_dim, conv_kernel and conv_stride are {convs}, expected as many of each, from 1 up")
    tensors = fold_weight_norm({name: sound(tensor, name, path) for name, tensor in tensors.items()})
    if "masked_spec_embed" not in tensors:  # encoding never masks, and stripped files lack it
        tensors["masked_spec_embed"] = torch.zeros(architecture["n_embd"])
    if architecture["pos_batch_norm"]:
        tensors.setdefault("encoder.pos_conv_embed.batch_norm.num_batches_tracked", torch.tensor(0))
    fitted = fit(HUBERT_ROWS, architecture, tensors, path)
    return architecture, {name: row.layout.read(parts, architecture) for name, (row, parts) in fitted.items()}


def hugging_face_hubert(folder):
    """Folder -> (keyword arguments of HubertConfig, {their name: tensor})."""
    settings = files.read_json(folder / "config.json")
    check_values(settings, families.HUBERT_KINDS, f"{folder}/config.json")
    if settings.get("model_type") != "hubert":
        raise ValueError(f"{folder}: model_type is {settings.get('model_type')!r}, expected 'hubert'{meant(settings)}")
    demand(settings, HUBERT_FIXED, f"{folder} is no HuBERT base")
    settings.setdefault("conv_pos_batch_norm", False)  # a key newer than the first releases
    lacking = [key for key in HUBERT_CONFIG if settings.get(key) is None]
    if lacking:
        raise ValueError(f"{folder}: config.json lacks {', '.join(lacking)} which a HuBERT needs")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    # preprocessor_config.json may ask for normalised waveforms; no published pipeline does that with these models
    source = files.open_tensors(folder)
    stored = unwrapped(source, "feature_projection.projection.weight", folder)
    names = {name.removeprefix("hubert."): stored[name] for name in stored}
    return {ours: settings[key] for key, ours in HUBERT_CONFIG.items()}, {
        name: source[stored] for name, stored in names.items() if not re.fullmatch(families.HUBERT_DROPPED, name)}


def fairseq_hubert(path):
    """fairseq .pt -> (keyword arguments of HubertConfig, {Hugging Face name: tensor}).

    The shapes of the tensors say most of the architecture; the file's settings, which stripped copies lack, say the rest.
    """
    settings, tensors = files.read_fairseq(path)
    table = families.FAIRSEQ_BATCH_NORM + FAIRSEQ_NAMES if "encoder.pos_conv.0.running_mean" in tensors else FAIRSEQ_NAMES
    left = {}
    for name, tensor in tensors.items():
        if not re.fullmatch(families.HUBERT_DROPPED, name):
            new = next((re.sub(f"^{old}", new, name) for old, new in table if re.match(old, name)), name)
            left[new] = tensor
    kind = str(settings.get("_name") or settings.get("arch"))
    if re.match(r"(wav2vec|wavlm|data2vec|unispeech)|\w+_(ctc|seq2seq)$", kind):
        raise ValueError(f"{path} is fairseq's {kind}, expected a HuBERT as it was pretrained; give its .pt file, or a {WANTED}")
    check_values(settings, {"normalize": bool, "encoder_attention_heads": int}, path)
    demand(settings, families.FAIRSEQ_FIXED, f"{path} is no HuBERT base")
    try:
        convs = [left[f"feature_extractor.conv_layers.{i}.conv.weight"]
                 for i in range(sum(name.endswith(".conv.weight") and "conv_layers" in name for name in left))]
        layers = {int(name.split(".")[2]) for name in left if name.startswith("encoder.layers.")}
        width = left["feature_projection.projection.weight"].shape[0]
        pos = next(left[name] for name in (f"{POS_CONV}.weight_v", f"{POS_CONV}.weight") if name in left)  # (C, C / groups, taps)
        architecture = dict(
            conv_dim=tuple(w.shape[0] for w in convs), conv_kernel=tuple(w.shape[2] for w in convs), n_embd=width,
            n_layer=len(layers), n_head=settings.get("encoder_attention_heads"),
            n_inner=left["encoder.layers.0.feed_forward.intermediate_dense.weight"].shape[0], pos_kernel=pos.shape[2],
            pos_groups=width // pos.shape[1], pos_batch_norm=table is not FAIRSEQ_NAMES, norm_eps=1e-5,
            normalize=bool(settings.get("normalize") or False))
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        named = f" ({error})" * isinstance(error, KeyError)
        raise ValueError(f"{path} is no HuBERT: a tensor is missing or of another shape{named}; give a fairseq HuBERT checkpoint "
                         "or a Hugging Face folder") from None
    if not architecture["n_head"]:
        architecture["n_head"] = heads = families.HEADS_OF_WIDTH.get(width)
        if not heads:
            raise ValueError(f"{path} has no settings, and a width of {width}, for which the number of attention heads cannot be "
                             "told; give a file with its settings, or a Hugging Face folder")
        files.note(f"{path} has no settings: {heads} attention heads, as the published HuBERT of its width")
    return architecture | {"conv_stride": strides(settings.get("conv_feature_layers"), architecture, path)}, left


def strides(text, architecture, where):
    """Stride of every convolution, from fairseq's conv_feature_layers; without one, what HuBERT base has for each kernel."""
    if text is None:
        usual = {10: 5, 3: 2, 2: 2}
        if not set(architecture["conv_kernel"]) <= set(usual):
            raise ValueError(f"{where} has no settings, and convolutions of {architecture['conv_kernel']} taps whose strides "
                             "cannot be told; give a file with its settings")
        return tuple(usual[taps] for taps in architecture["conv_kernel"])
    layers = parse_conv_layers(text)
    if [layer[:2] for layer in layers] != list(zip(architecture["conv_dim"], architecture["conv_kernel"])):
        raise ValueError(f"{where}: conv_feature_layers says {text}, but the weights have widths {architecture['conv_dim']} and "
                         f"kernels {architecture['conv_kernel']}; settings and weights belong to different models")
    return tuple(layer[2] for layer in layers)


def parse_conv_layers(text):
    """"[(512,10,5)] + [(512,3,2)] * 4" -> [(512, 10, 5), (512, 3, 2), ...]. Python's syntax, but nothing is evaluated."""
    def value(node):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            layers = value(node.left) + value(node.right)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            layers = value(node.left) * min(ast.literal_eval(node.right), 65)
        else:
            layers = ast.literal_eval(node)
        if type(layers) is not list or not 0 < len(layers) <= 64:  # nobody has more convolutions
            raise ValueError
        return layers

    try:
        if not isinstance(text, str) or len(text) > 1000:
            raise ValueError
        layers = value(ast.parse(text.strip(), mode="eval").body)
        if not all(type(layer) is tuple and len(layer) == 3 for layer in layers):
            raise ValueError
        if not all(type(n) is int and 0 < n < 10_000 for layer in layers for n in layer):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(f"conv_feature_layers {text!r:.80} is no list of (width, kernel, stride); nothing was evaluated"
                         ) from None
    return layers


def write_hubert(architecture, tensors):
    """The reverse of read_hubert: (their config.json, {their name: tensor})."""
    settings = {"architectures": ["HubertModel"], "model_type": "hubert", **HUBERT_FIXED,
                **{key: architecture[ours] for key, ours in HUBERT_CONFIG.items()},
                "num_feat_extract_layers": len(architecture["conv_dim"]), "vocab_size": 32}
    theirs = write_rows(HUBERT_ROWS, architecture, tensors)
    if not architecture["pos_batch_norm"]:  # transformers wants weight norm there, and any direction with its own length is one
        v = theirs.pop(f"{POS_CONV}.weight")
        new = f"{POS_CONV}.parametrizations.weight.original"
        theirs |= {f"{new}0": torch.linalg.vector_norm(v.float(), dim=(0, 1), keepdim=True).to(v.dtype), f"{new}1": v}
    return settings, theirs


def fold_weight_norm(tensors):
    """w = g v / |v| for every weight stored as length g and direction v, in either spelling; the rest as it is.

    |v| runs over the dimensions that g has not: all but output channels in a convolution, all but INPUT channels in a
    transposed one, all but the taps in HuBERT's positional convolution. Source: Salimans & Kingma 2016, section 2.
    """
    spellings = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
    folded = dict(tensors)
    for length, direction in spellings:
        for name in [name for name in tensors if name.endswith("." + direction)]:
            stem = name.removesuffix(direction)
            if stem + length not in folded:
                raise ValueError(f"the checkpoint has {name} but no {stem + length}; it is incomplete")
            v, g = folded.pop(name).float(), folded.pop(stem + length).float()
            axes = [axis for axis, size in enumerate(g.shape) if size == 1]
            if g.ndim != v.ndim or not axes or any(g.shape[axis] not in (1, v.shape[axis]) for axis in range(v.ndim)):
                raise ValueError(f"{name} of shape {tuple(v.shape)} and {stem + length} of {tuple(g.shape)} do not fit together; "
                                 "the checkpoint is damaged")
            folded[stem + "weight"] = g * v / torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return folded
