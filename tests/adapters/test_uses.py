"""What a sequence uses: equal uses have equal keys, others do not."""

from adapters.types import AdapterPart, AdapterRef, AdapterUse, Revision

ANT, BEE = (AdapterRef(name, Revision(f"r-{name}")) for name in ("ant", "bee"))
ALIAS = AdapterRef("ant-by-another-name", ANT.revision)


def test_one_adapter_is_called_as_it_is_and_shares_its_key_with_its_other_names() -> None:
    assert AdapterUse.of(ANT).name == "ant"
    assert AdapterUse.of(ANT).key == AdapterUse.of(ALIAS).key == b"r-ant"


def test_the_order_of_several_adapters_does_not_matter() -> None:
    parts = (AdapterPart(BEE, 2.0), AdapterPart(ANT, 0.5))
    assert AdapterUse.sum_of(parts) == AdapterUse.sum_of(reversed(parts))
    assert AdapterUse.sum_of(parts).name == "ant:0.5+bee:2"


def test_an_adapter_that_comes_twice_is_used_once_with_both_scales() -> None:
    use = AdapterUse.sum_of((AdapterPart(ANT, 0.5), AdapterPart(ALIAS, 0.25)))
    assert use.parts == (AdapterPart(ANT, 0.75),)


def test_scales_change_the_key() -> None:
    keys = {
        AdapterUse.of(ANT).key,
        AdapterUse((AdapterPart(ANT, 0.5),)).key,
        AdapterUse.sum_of((AdapterPart(ANT), AdapterPart(BEE))).key,
        AdapterUse.sum_of((AdapterPart(ANT), AdapterPart(BEE, 0.5))).key,
    }
    assert len(keys) == 4
