"""The known names: what each stands for, where it is published, and the SHA-256 by which it is recognised.

    KNOWN[kind][name] -> Entry(files, ...); kind is what an option asks for. download.py finds and fetches them.

Source: addresses and hashes as textlesslib publishes them (textless/checkpoint_manager).
"""
from typing import NamedTuple


class File(NamedTuple):
    url: str  # below the host; its last word is the name in our cache
    sha256: str | None = None  # None where none was published
    textless: str | None = None  # textlesslib's name of it, where that is another

    @property
    def name(self):
        return self.url.rpartition("/")[2]


class Entry(NamedTuple):
    files: list[File]  # the first is what find() returns, the others stand beside it
    layer: int | None = None  # k-means: the HuBERT layer whose features it divides
    kmeans: str | None = None  # tokenizer: the k-means that is meant when none is named


SPEECH = "textless_nlp/twist/speech_tokenizer/"
MHUBERT = SPEECH + "mhubert_base_25hz_cp_mls_cv_sp_fisher"
HIFIGAN = SPEECH + "hifigan_lj_mhubert_base_25hz"  # one speaker, LJ
EXPRESSO = "hifigan_expresso_lj_vctk_hubert_base_ls960_L9_km500"  # several speakers and styles
KNOWN = {
    "lm": {},
    "model": {name: Entry([File(f"textless_nlp/twist/lms/{name}.zip")]) for name in ("TWIST-350M", "TWIST-1.3B", "TWIST-7B")},
    "tokenizer": {
        "mhubert-base-25hz": Entry(kmeans="mhubert-base-25hz-kmeans-500", files=[
            File(MHUBERT + ".pt", "edf0f5be2581a568a236aeb2781a5607c5af25806e12f40f7f2391e861fe3cf0")]),
        "hubert-base-ls960": Entry(kmeans="hubert-base-ls960-layer-9-kmeans-500", files=[
            File("hubert/hubert_base_ls960.pt", "1703cf8d2cdc76f8c046f5f6a9bcd224e0e6caf4744cad1a1f4199c32cac8c8d")]),
    },
    "kmeans": {
        "mhubert-base-25hz-kmeans-500": Entry(layer=11, files=[
            File(MHUBERT + "_L11_km500.bin", "03cc04a9c24fec4285e73e709c485756d8f116aa8e724eac555de6a7cf8d28ad")]),
        "hubert-base-ls960-layer-9-kmeans-500": Entry(layer=9, files=[
            File("hubert/hubert_base_ls960_L9_km500.bin", "4450dcbc90aa7d0553306a4b0fafef35c9b3c840468f02969273dfbb9db89a23",
                 textless="hubert_base_ls960_L9_km500.pt")]),
        **{f"hubert-base-ls960-kmeans-{k}": Entry(layer=6, files=[
            File(f"textless_nlp/gslm/hubert/km{k}/km.bin", sha256, textless=f"hubert_base_ls960_km{k}.pt")])
           for k, sha256 in ((50, "d01a7d5bc2c54b7b5f25f321ba525b4d230b06e3927f90bad0394198bc89f494"),
                             (100, "f14a3104615485381fc489701d6761c9abbdbb0d43607cf55518a1e2891023fe"),
                             (200, "b3c46c9cdd1707ad852dd53c359aa73942e79d53c432a9a8a419ed046408024b"),
                             (500, "411c8668e1314751404f58636f935fc73540a6793890435da4a8ffadf157398e"))},
    },
    "vocoder": {
        "mhubert-base-25hz-kmeans-500-hifigan": Entry([
            File(HIFIGAN + ".pt", "d88224e95c501e2cd59a6e4014753169cfe060fb7ade3cc0da03c809fef73b79"),
            File(HIFIGAN + "_config.json", "116dc39be4970cd393e562acd0a0ec70a86aaba7e9ca469b8b836cb3fe46afc7")]),
        "hubert-base-ls960-layer-9-kmeans-500-hifigan": Entry([
            File(f"textless_nlp/expresso/checkpoints/{EXPRESSO}/{name}", sha256, textless=f"{EXPRESSO}_{name}")
            for name, sha256 in (("generator.pt", "d50f4704e961c29cb386924ef32cd0c3a4d1089a3f9be856f8a3b6dcfdd6147a"),
                                 ("config.json", "31e65ef5e100cb43de08f2c8d225496ace1ed87a49fcb8ee44bd6805f079b1f0"),
                                 ("speakers.txt", "2efabb7a4ad786da34fe6fbe99c3906b7abd40b2e01c81b7efde76142ae3d552"),
                                 ("styles.txt", "a6f63206518448277c63c3a251ac13484784829cf2e1b0a23b0860dd32543520"))]),
    },
}
