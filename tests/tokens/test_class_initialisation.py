import pytest
import torch
from torch.nn.functional import normalize

from tokenlearn.errors import UserError
from tokenlearn.tokens import PlaceholderVocabulary, TokenBank, class_vectors, with_vectors, word_ids
from tokenlearn.tokens.class_initialisation import mean_gradients, nearest_words, pull_back, ridge_vectors
from tokenlearn.tokens.injection import accept_learned_embeddings, learned_embeddings

WORDS, VECTORS, WIDTH, FEATURES = 40, 2, 6, 9


@pytest.fixture
def toy():
    """Features that depend linearly on the vectors, by another matrix for each image."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    batches = [
        (normal(count, FEATURES), normal(FEATURES, VECTORS * WIDTH) + 0.3 * normal(count, FEATURES, VECTORS * WIDTH))
        for count in (3, 1)
    ]

    def features(vectors, batch):
        offsets, jacobians = batch
        return offsets + jacobians @ vectors.flatten()

    jacobian = torch.cat([jacobians for _, jacobians in batches]).mean(0)
    return {
        "features": features,
        "batches": batches,
        "jacobian": jacobian,
        "base": normal(VECTORS, WIDTH),
        "table": 0.5 * normal(WORDS, WIDTH),
        "directions": normal(3, FEATURES),
    }


def arguments(toy, *names):
    return [toy[name] for name in names]


def choice(toy, candidates=range(WORDS)):
    """Images and words to choose from."""
    return {"batches": toy["batches"], "table": toy["table"], "candidates": candidates}


def test_mean_gradient_is_the_transposed_jacobian_over_all_images(toy):
    with torch.no_grad():  # wherever it is called from
        gradients = mean_gradients(*arguments(toy, "features", "base", "directions", "batches"))
    expected = (toy["directions"] @ toy["jacobian"]).reshape(3, VECTORS, WIDTH)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    assert not gradients.requires_grad


def test_pull_back_steps_each_vector_by_the_given_length(toy):
    gradients = 1e-9 * torch.randn(3, VECTORS, WIDTH, generator=torch.Generator().manual_seed(1))
    gradients[0, 1] = 0
    steps = pull_back(toy["base"], gradients, 0.7) - toy["base"]
    torch.testing.assert_close(steps, 0.7 * normalize(gradients, dim=2, eps=1e-30), rtol=1e-4, atol=1e-6)
    assert not steps[0, 1].any()
    torch.testing.assert_close(steps[1:].norm(dim=2), torch.full((2, VECTORS), 0.7), rtol=1e-4, atol=1e-6)


def changes_of(toy, vectors):
    """Mean change of the features from the base's edits to those of (m, VECTORS, WIDTH)."""
    return (vectors - toy["base"]).flatten(1) @ toy["jacobian"].T


def test_nearest_word_moves_features_along_the_direction_and_not_away_from_it(toy):
    words = toy["table"][:, None].expand(-1, VECTORS, -1)
    wanted = [7, 11, 30]
    directions = changes_of(toy, words[wanted])
    directions = directions + 0.02 * torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(4))
    found = nearest_words(*arguments(toy, "features", "base"), directions, **choice(toy), num_candidates=WORDS)
    assert torch.equal(found, words[wanted])


def test_a_word_that_goes_further_but_astray_is_not_taken():
    def features(vectors, batch):
        return vectors.sum(dim=0)[None, :2]

    table = torch.zeros(3, WIDTH)
    table[:, :2] = torch.tensor([[1.0, 0.5], [3.0, 3.1], [-2.0, 0.0]])
    words = {"batches": [None], "table": table, "candidates": range(3), "num_candidates": 3}
    inputs = (features, torch.zeros(VECTORS, WIDTH), torch.tensor([[5.0, 0.0]]))
    assert torch.equal(nearest_words(*inputs, **words)[0, 0], table[0])
    table[1, 1] = 2.4  # scores 2 (3 - 2.4) now, above 2 (1 - 0.5)
    assert torch.equal(nearest_words(*inputs, **words)[0, 0], table[1])


def test_a_class_that_no_word_is_for_starts_from_the_base(toy):
    for num_candidates in (1, 4, WORDS):
        found = nearest_words(
            *arguments(toy, "features", "base", "directions"),
            **choice(toy, range(5, WORDS)),
            num_candidates=num_candidates,
        )
        assert torch.equal(found, toy["base"].expand(3, -1, -1))


def test_shortlisted_words_are_judged_by_their_own_edits(toy):
    """Features that fall off where the gradient says that they rise."""

    def saturating(vectors, batch):
        return torch.stack([vectors[:, 0].sum() - 0.5 * vectors[:, 0].square().sum()])[None]

    table = torch.zeros(4, WIDTH)
    table[:, 0] = torch.tensor([9.0, 3.0, 1.0, -1.0])
    base, direction = torch.zeros(VECTORS, WIDTH), torch.ones(1, 1)
    words = {"batches": [None], "table": table, "candidates": range(4)}
    found = {n: nearest_words(saturating, base, direction, **words, num_candidates=n)[0, 0, 0] for n in (1, 2, 3, 4)}
    assert found == {1: 0, 2: 0, 3: 1, 4: 1}  # 0 is the base, of which the first words' edits fall short


def test_ridge_finds_the_vector_whose_edit_gave_the_direction(toy):
    """Features of one image, in more dimensions than the embedding: then the map can be undone."""
    matrix = torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(2))
    expected = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))

    def features(vectors, batch):
        return (10 + matrix @ vectors[0])[None]

    vectors = ridge_vectors(
        features,
        toy["base"],
        expected @ matrix.T,
        **(choice(toy) | {"batches": [None]}),
        num_words=20,
        ridge=1e-5,
        norm=0.4,
    )
    expected = 0.4 * normalize(expected, dim=1)[:, None].expand(-1, VECTORS, -1)
    torch.testing.assert_close(vectors, expected, rtol=1e-2, atol=1e-3)


def test_ridge_equals_its_primal_form(toy):
    fit = {"num_words": WORDS, "ridge": 0.3, "norm": 1.0}
    vectors = ridge_vectors(*arguments(toy, "features", "base", "directions"), **choice(toy), **fit)
    edits = torch.stack([
        torch.cat([toy["features"](word.expand(VECTORS, -1), batch) for batch in toy["batches"]]).mean(0)
        for word in toy["table"]
    ])  # fmt: skip
    edits, targets = edits - edits.mean(0), toy["table"] - toy["table"].mean(0)
    weight = 0.3 * edits.square().sum() / WORDS
    solution = torch.linalg.solve(edits.T @ edits + weight * torch.eye(FEATURES), edits.T @ targets)
    expected = normalize(toy["directions"] @ solution, dim=1)
    torch.testing.assert_close(vectors, expected[:, None].expand_as(vectors), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("initialiser", ["words", "pull_back", "vocabulary", "ridge"])
def test_every_initialiser_behind_one_argument(toy, initialiser):
    if initialiser == "vocabulary":  # random directions belong to no word
        toy["directions"] = changes_of(toy, toy["table"][[7, 11, 30], None].expand(-1, VECTORS, -1))
    evaluations = []

    def progress(steps):
        for step in steps:
            evaluations.append(step)
            yield step

    vectors = class_vectors(
        initialiser,
        *arguments(toy, "base", "directions"),
        features=toy["features"],
        **choice(toy),
        step=2.0,
        num_candidates=WORDS,
        progress=progress,
    )
    gradients, words = len(toy["batches"]), WORDS
    expected = {"words": 0, "pull_back": gradients, "vocabulary": gradients + 1 + words, "ridge": words}
    assert len(evaluations) == expected[initialiser]
    assert vectors.shape == (3, VECTORS, WIDTH)
    assert not vectors.requires_grad
    median = toy["table"].norm(dim=1).median()
    if initialiser == "words":
        assert torch.equal(vectors, toy["base"].expand(3, -1, -1))
        return
    if initialiser == "pull_back":
        torch.testing.assert_close((vectors - toy["base"]).norm(dim=2), (2 * median).expand(3, VECTORS))
    if initialiser == "vocabulary":
        assert torch.equal(vectors, toy["table"][[7, 11, 30], None].expand(-1, VECTORS, -1))
        return
    if initialiser == "ridge":
        torch.testing.assert_close(vectors.norm(dim=2), median.expand(3, VECTORS))
    # All of them move features along their direction, compared with the other classes' vectors.
    moved = vectors.flatten(1) @ toy["jacobian"].T @ toy["directions"].T
    assert torch.equal(moved.argmax(0), torch.arange(3))


def test_refusals(toy):
    start = arguments(toy, "base", "directions")
    with pytest.raises(UserError, match=r"'ridge'.*images"):
        class_vectors("ridge", *start, features=toy["features"], **(choice(toy) | {"batches": []}))
    with pytest.raises(UserError, match=r"'vocabulary'.*words"):
        class_vectors("vocabulary", *start, features=toy["features"], **choice(toy, ()))
    with pytest.raises(UserError, match=r"ridge.*0\.0"):
        class_vectors("ridge", *start, features=toy["features"], **choice(toy), ridge=0.0)
    with pytest.raises(UserError, match="start tokens from 'words'"):
        mean_gradients(toy["features"], toy["base"], torch.zeros(1, FEATURES), toy["batches"])


def test_with_vectors_reaches_the_prompt_and_leaves_the_bank(tokenizer, text_encoder):
    bank = TokenBank({"<hat>": 2, "<smile>": 1}, [16])
    bank.vectors[0].data.normal_()
    vocabulary = PlaceholderVocabulary(bank, [tokenizer])
    accept_learned_embeddings(text_encoder)
    before = bank.vectors[0].detach().clone()

    def encode(prompt):
        ids = vocabulary.tokenizers[0](vocabulary.expand(prompt), return_tensors="pt").input_ids
        rows = vocabulary.rows(ids, 0)
        with learned_embeddings(rows, bank.vectors[0]):
            return text_encoder(ids.masked_fill(rows >= 0, 0)).last_hidden_state

    read = with_vectors(bank, "<hat>", encode)
    vectors = torch.randn(2, 16, requires_grad=True)
    states = read(vectors, "a <hat> and <smile>")
    states.square().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.any(dim=1).all()
    assert bank.vectors[0].grad is None
    assert torch.equal(bank.vectors[0], before)
    torch.testing.assert_close(read(before[:2], "a <hat> and <smile>"), encode("a <hat> and <smile>"))
    bank.set("<hat>", [vectors])
    torch.testing.assert_close(encode("a <hat> and <smile>"), states)


def test_with_vectors_of_two_text_encoders_lie_side_by_side():
    bank = TokenBank({"<hat>": 1}, [2, 3])
    read = with_vectors(bank, "<hat>", lambda factor: factor * torch.cat([*bank.vectors], dim=1))
    assert read(torch.arange(5.0)[None], 2).tolist() == [[0, 2, 4, 6, 8]]
    assert not torch.cat([*bank.vectors], dim=1).any()


def test_word_ids(tokenizer):
    assert tokenizer.convert_ids_to_tokens(word_ids(tokenizer, ["hat", "old"])) == ["hat</w>", "old</w>"]
    words = tokenizer.convert_ids_to_tokens(word_ids(tokenizer))
    assert {"hat</w>", "smiling</w>"} < set(words)
    assert all(word.endswith("</w>") and word[:-4].isalpha() for word in words)
    with pytest.raises(UserError, match="'hatter' is"):
        word_ids(tokenizer, ["hat", "hatter"])
