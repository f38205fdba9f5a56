"""Which names of a model may stand for which price row: exact names, and aliases by date or path.

A name that a provider answers with is looked up as it is, then without the path or region it is
qualified by, then without the date or version that pins it. Nothing here is fuzzy: no substring,
no nearest name. "gpt-5-mini" never finds "gpt-5". This file refuses to know prices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Other projects' names for providers, accepted wherever a person names one.
PROVIDER_ALIASES = {
    "google": "gemini", "google_ai": "gemini", "gemini_code_assist": "gemini", "x-ai": "xai",
    "x_ai": "xai", "grok": "xai", "azure": "azure_openai", "azure-openai": "azure_openai",
    "aws": "bedrock", "aws_bedrock": "bedrock", "amazon": "bedrock", "vertexai": "vertex",
    "vertex_ai": "vertex", "google_vertex": "vertex", "together_ai": "together",
    "togetherai": "together", "fireworks_ai": "fireworks", "mistralai": "mistral",
    "chatgpt": "openai", "codex": "openai", "claude": "anthropic", "pplx": "perplexity",
    "google_ai_studio": "gemini", "google-gla": "gemini", "google_genai": "gemini",
    "google-vertex": "vertex", "amazon_bedrock": "bedrock", "amazon-bedrock": "bedrock",
    "bedrock_mantle": "bedrock", "bedrock_converse": "bedrock", "ollama_cloud": "ollama",
    "mistral_ai": "mistral", "x.ai": "xai", "z.ai": "zai", "azure_ai": "azure_ai_foundry",
    "perplexity_ai": "perplexity", "hugging_face": "huggingface",
    "vercel": "vercel_gateway", "vercel_ai_gateway": "vercel_gateway", "googleai": "gemini",
    "google_ai_gemini": "gemini", "google_gla": "gemini", "google_vertex_ai": "vertex",
    "google_vertexai": "vertex", "azure_openai_service": "azure_openai", "deepseek_ai": "deepseek",
}  # fmt: skip

# Where else a provider's models are priced: it sells another provider's models at that one's rates.
_PRICED_AS: dict[str, tuple[str, ...]] = {
    "vertex": ("vertex", "gemini", "anthropic", "mistral", "xai"),
    "gemini": ("gemini", "anthropic"),
    "azure_openai": ("azure_openai", "openai", "anthropic", "deepseek", "xai", "moonshotai"),
    "azure_ai_foundry": (
        "azure_openai",
        "openai",
        "anthropic",
        "deepseek",
        "xai",
        "moonshotai",
        "mistral",
        "cohere",
    ),
    "voyage": ("voyageai",),
    "moonshot": ("moonshotai",),
    "nebius": ("nebius", "huggingface_nebius"),
    "volcengine": ("volcengine", "byteplus"),
    "hyperbolic": ("huggingface_hyperbolic",),
    "sambanova": ("huggingface_sambanova",),
}

# Price files under a maker's other name, and the provider whose traffic they price.
READ_AS = {"moonshotai": "moonshot", "voyageai": "voyage", "zhipuai": "zai"}

# Whose rules (tools, tiers, cache writes) hold for a provider's own rows beside its own rules.
RULES_AS = {"azure_openai": "openai"}

# The first path segment by which a provider's own models are qualified ("openai/gpt-5").
_OWN_PREFIXES = {
    "gemini": ("google", "gemini"),
    "xai": ("x-ai", "xai"),
    "mistral": ("mistral", "mistralai"),
    "moonshotai": ("moonshotai", "moonshot"),
    "perplexity": ("perplexity",),
}
# The last line names those that say that they sell at the makers' prices, or use the user's keys.
_ROUTERS = frozenset(
    {
        "openrouter", "vercel_gateway", "portkey", "requesty", "pydantic_gateway", "heroku",
        "amp", "braintrust", "factory", "gitlab", "kilo", "opencode", "roocode",
    }
)  # fmt: skip
# Whose names a router may pass on unqualified; names of different makers do not collide.
_PASSED_ON = (
    "openai", "anthropic", "gemini", "xai", "mistral", "deepseek", "cohere", "zai", "moonshotai",
    "minimax",
)  # fmt: skip

_PATH = re.compile(r"^(?:.*[/:])?(?:models|foundation-model|inference-profile)/")
_REGION = re.compile(r"^(?:us-gov|us|eu|apac|au|jp|ca|sa|global)\.(?=[a-z0-9-]+\.)")
# What pins a model to a date or a build, tried in turn, each at most once.
_PINS = (
    re.compile(r":\d+(?::[a-z0-9]+)?$"),  # Bedrock's ":0", ":0:200k"
    re.compile(r"-v\d+$"),  # Bedrock's "-v1"
    re.compile(r"@(?:default|latest|\d{8})$"),  # Vertex's "@20250929"
    re.compile(r"-latest$"),
    re.compile(r"-(?:preview|exp)-\d{2}-\d{2}$"),  # Gemini's "-preview-05-06"
    re.compile(r"-20\d{6}$"),  # Anthropic's "-20250929"
    re.compile(r"-20\d{2}-\d{2}-\d{2}$"),  # OpenAI's "-2025-08-07"
    re.compile(r"-0\d{2}$"),  # Gemini's "-001"
)
_NAME_CHARS_MAX = 256


def canonical_provider(name: str) -> str:
    """Our id of a provider that a person or another tool names."""
    lower = name.strip().lower()
    plain = lower.replace("-", "_").replace(" ", "_")
    return PROVIDER_ALIASES.get(lower) or PROVIDER_ALIASES.get(plain) or lower


def price_providers(provider: str, model: str) -> tuple[str, ...]:
    """The providers whose price files hold the prices of `provider`'s `model`, in order."""
    if provider in _ROUTERS:
        head = canonical_provider(model.partition("/")[0])
        return (provider, head, *_PASSED_ON)
    return _PRICED_AS.get(provider, (provider,))


def candidates(model: str, owner: str) -> Iterator[str]:
    """The names under which `owner`'s prices may hold `model`, the most exact first."""
    if len(model) > _NAME_CHARS_MAX:
        return
    name = model.strip().lower()
    forms = [name]
    if (bare := _PATH.sub("", name)) != name:
        forms.append(bare)
    head, slash, rest = forms[-1].partition("/")
    if slash and head in _OWN_PREFIXES.get(owner, (owner,)):
        forms.append(rest)
    if forms[-1].startswith("ft:"):  # a fine-tune: "ft:gpt-4o-2024-08-06:org::id"
        forms.append(":".join(forms[-1].split(":")[:2]))
    for form in forms:
        yield from _unpinned(form)
    without_region = _REGION.sub("", forms[-1])
    if without_region != forms[-1]:
        yield from _unpinned(without_region)
    if owner == "bedrock" and not forms[-1].startswith(("global.", "regional.")):
        yield from _unpinned(f"regional.{without_region}")  # one price for all regions but global


def _unpinned(name: str) -> Iterator[str]:
    yield name
    for pin in _PINS:
        shorter = pin.sub("", name)
        if shorter != name:
            yield shorter
            name = shorter
