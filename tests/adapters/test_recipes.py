"""A merge's key: equal for what gives the same numbers, and for nothing else."""

from adapters.recipes import MajoritySign, MergeMethod, MergeRecipe
from adapters.types import Revision

ANT, BEE = Revision("r-ant"), Revision("r-bee")
TIES, DARE = MergeMethod.TIES, MergeMethod.DARE_LINEAR


def test_order_of_the_adapters_does_not_matter() -> None:
    for method in MergeMethod:
        one, other = MergeRecipe((0.5, 2.0), method, 0.3), MergeRecipe((2.0, 0.5), method, 0.3)
        assert one.key((ANT, BEE)) == other.key((BEE, ANT)) != other.key((ANT, BEE))
        assert one.in_order((ANT, BEE)) == (0, 1)
        assert other.in_order((BEE, ANT)) == (1, 0)
        assert other.for_positions((1, 0)) == one


def test_all_that_changes_the_numbers_changes_the_key() -> None:
    recipes = [
        MergeRecipe((1.0, 1.0)),
        MergeRecipe((1.0, 1.5)),
        MergeRecipe((1.0, 1.0), TIES, 0.5),
        MergeRecipe((1.0, 1.0), TIES, 0.6),
        MergeRecipe((1.0, 1.0), TIES, 0.5, MajoritySign.FREQUENCY),
        MergeRecipe((1.0, 1.0), DARE, 0.5),
    ]
    keys = {recipe.key((ANT, BEE)) for recipe in recipes}
    assert len(keys) == len(recipes)
    assert MergeRecipe((1.0, 1.0)).key((ANT, ANT)) not in keys


def test_what_means_nothing_is_not_in_the_key() -> None:
    def key(recipe: MergeRecipe) -> str:
        return recipe.key((ANT, BEE)[: len(recipe.weights)])

    assert key(MergeRecipe((1.0, 1.0))) == key(
        MergeRecipe((1.0, 1.0), density=0.1, majority_sign=MajoritySign.FREQUENCY)
    )
    assert key(MergeRecipe((1.0, 1.0), DARE, 0.5)) == key(
        MergeRecipe((1.0, 1.0), DARE, 0.5, MajoritySign.FREQUENCY)
    )
    assert key(MergeRecipe((2.0,))) == key(MergeRecipe((2.0,), TIES, 0.5)), "one adapter is only weighted"


def test_names_are_for_people_and_are_bounded() -> None:
    assert MergeRecipe((0.5, 2.0)).name_for(("ant", "bee")) == "linear(ant:0.5+bee:2)"
    recipe = MergeRecipe((1.0, 1.0), TIES, 0.3, MajoritySign.FREQUENCY)
    assert recipe.name_for(("ant", "bee")) == "ties(ant:1+bee:1, density 0.3, frequency)"
    name = recipe.name_for(("a" * 250, "b" * 250))
    assert len(name) == 256
    assert name.endswith("…, density 0.3, frequency)")
