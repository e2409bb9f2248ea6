"""From the settings of a judge to the judge."""

from collections.abc import Mapping

from nspo.judges.judge import AddedJudge
from nspo.run.devices import device_of
from nspo.settings.judges import AnyJudge, ClassifierJudge, EndpointJudge
from nspo.settings.runtime import RuntimeSettings


def added_judges(judges: Mapping[str, AnyJudge], runtime: RuntimeSettings) -> list[AddedJudge]:
    """The judges of a configuration, in its order; a model's weights are loaded only when it judges.

    Raises:
        UserError: for a package, model, label or chat template that is missing.
    """
    return [judge_of(f"evaluation.judges.{name}", settings, runtime) for name, settings in judges.items()]


def judge_of(key: str, settings: AnyJudge, runtime: RuntimeSettings, stay: bool = False) -> AddedJudge:
    """The judge that stands under `key` of a configuration, whose last part is its name.

    Args:
        stay: keep a model's weights in memory from the first verdict on, for a judge that is asked again and again.

    Raises:
        UserError: for a package, model, label or chat template that is missing.
    """
    if isinstance(settings, EndpointJudge):
        from nspo.judges.endpoint import SafetyEndpoint

        return SafetyEndpoint(key, settings, runtime.requests)
    from nspo.judges.local import Classifier, Guard

    if isinstance(settings, ClassifierJudge):
        return Classifier(key, settings, device_of(runtime.device), stay)
    return Guard(key, settings, device_of(runtime.device), stay)
