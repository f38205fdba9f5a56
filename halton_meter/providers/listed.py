"""Hosts that speak OpenAI's API, or Anthropic's, under a name of their own, and no more than that.

Compiled by hand from the lists of base URLs that clients carry (models.dev, litellm, opencode,
cc-switch) and the vendors' own pages, 2026-11-29. Whoever differs has a file of its own, or a row
in `compatible.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from halton_meter.providers import Provider
from halton_meter.providers.anthropic import ROUTES as ANTHROPIC_ROUTES
from halton_meter.providers.compatible import compatible
from halton_meter.providers.gemini.content import content_routes
from halton_meter.providers.openai.routes import ROUTES as OPENAI_ROUTES
from halton_meter.providers.openai.text import text_routes
from halton_meter.providers.reading.places import planned

# Makers of models, at their own hosts.
_MAKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("xiaomi", (
        "api.xiaomimimo.com", "token-plan-ams.xiaomimimo.com", "token-plan-cn.xiaomimimo.com",
        "token-plan-sgp.xiaomimimo.com",
    )),
    ("stepfun", ("api.stepfun.com", "api.stepfun.ai")),
    ("tencent", (
        "tokenhub.tencentmaas.com", "tokenhub-intl.tencentcloudmaas.com",
        "api.hunyuan.cloud.tencent.com", "api.lkeap.cloud.tencent.com",
    )),
    ("bailing", ("api.tbox.cn",)),
    ("streamlake", ("vanchin.streamlake.ai", "wanqing.streamlakeapi.com")),
    ("longcat", ("api.longcat.chat",)),
    ("iflow", ("apis.iflow.cn",)),
    ("iflytek", ("spark-api-open.xf-yun.com",)),
    ("01ai", ("api.lingyiwanwu.com",)),
    ("baichuan", ("api.baichuan-ai.com",)),
    ("sensenova", ("api.sensenova.cn", "token.sensenova.cn")),
    ("meta", ("api.meta.ai", "api.llama.com")),
    ("amazon_nova", ("api.nova.amazon.com",)),
    ("arcee", ("api.arcee.ai", "conductor.arcee.ai")),
    ("reka", ("api.reka.ai",)),
    ("morph", ("api.morphllm.com",)),
    ("poolside", ("inference.poolside.ai",)),
    ("sakana", ("api.sakana.ai",)),
    ("sarvam", ("api.sarvam.ai",)),
    ("thinkingmachines", ("tinker.thinkingmachines.dev",)),
    ("cognition", ("api.cognition.ai",)),
    ("v0", ("api.v0.dev",)),
    ("gigachat", ("gigachat.devices.sberbank.ru",)),
)  # fmt: skip

# Who serves open models, and sells other makers' models on.
_RESELLERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("302ai", ("api.302.ai",)),
    ("abacus", ("routellm.abacus.ai",)),
    ("abliteration", ("api.abliteration.ai",)),
    ("ai_router", ("api.ai-router.dev",)),
    ("aiand", ("api.aiand.com",)),
    ("aihubmix", ("aihubmix.com", "api.aihubmix.com")),
    ("aimlapi", ("api.aimlapi.com",)),
    ("aki_io", ("aki.io",)),
    ("ambient", ("api.ambient.xyz",)),
    ("anyapi", ("api.anyapi.ai",)),
    ("anyscale", ("api.endpoints.anyscale.com",)),
    ("assemblyai", ("llm-gateway.assemblyai.com", "llm-gateway.eu.assemblyai.com")),
    ("auriko", ("api.auriko.ai",)),
    ("berget", ("api.berget.ai",)),
    ("blueclaw", ("openai.blueclaw.network",)),
    ("braintrust", ("api.braintrust.dev",)),
    ("charity_engine", ("api.charityengine.services",)),
    ("charm_hyper", ("hyper.charm.land",)),
    ("chutes", ("llm.chutes.ai",)),
    ("clarifai", ("api.clarifai.com",)),
    ("claudinio", ("api.claudin.io",)),
    ("cline", ("api.cline.bot",)),
    ("cloudferro", ("api-sherlock.cloudferro.com",)),
    ("coralbricks", ("inference.coralbricks.ai",)),
    ("cortecs", ("api.cortecs.ai",)),
    ("crof", ("crof.ai",)),
    ("crossmodel", ("api.crossmodel.ai",)),
    ("darkbloom", ("api.darkbloom.dev",)),
    ("daoxe", ("daoxe.com",)),
    ("digitalocean", ("inference.do-ai.run",)),
    ("dinference", ("api.dinference.com",)),
    ("dmxapi", ("www.dmxapi.cn", "api.dmxapi.cn")),
    ("drun", ("chat.d.run",)),
    ("ebcloud", ("maas-api.ebcloud.com",)),
    ("edenai", ("api.edenai.run",)),
    ("empiriolabs", ("api.empiriolabs.ai",)),
    ("evroc", ("models.think.evroc.com",)),
    ("fastrouter", ("go.fastrouter.ai",)),
    ("featherless", ("api.featherless.ai",)),
    ("freemodel", ("cc.freemodel.dev", "api.freemodel.dev")),
    ("frogbot", ("app.frogbot.ai",)),
    ("galadriel", ("api.galadriel.com",)),
    ("gmicloud", ("api.gmi-serving.com",)),
    ("glama", ("glama.ai",)),
    ("greenpt", ("api.greenpt.ai",)),
    ("helicone", ("ai-gateway.helicone.ai",)),
    ("hetzner", ("inference.hetzner.com",)),
    ("hostinger", ("router.hostinger.com",)),
    ("hpc_ai", ("api.hpc-ai.com",)),
    ("huawei", ("*.modelarts-maas.com",)),
    ("impossibl", ("api.impossibl.com",)),
    ("inceptron", ("api.inceptron.io",)),
    ("inference_net", ("inference.net", "api.inference.net")),
    ("inferenceapis", ("api.inferenceapis.com",)),
    ("inferx", ("model.inferx.net",)),
    ("infini", ("cloud.infini-ai.com",)),
    ("io_net", ("api.intelligence.io.solutions",)),
    ("jalapeno", ("api.jalapeno-cloud.ai",)),
    ("jiekou", ("api.jiekou.ai",)),
    ("kenari", ("kenari.id",)),
    ("kilo", ("api.kilo.ai",)),
    ("kluster", ("api.kluster.ai",)),
    ("kosmik", ("api.koscompute.com",)),
    ("kuae_cloud", ("coding-plan-endpoint.kuaecloud.net",)),
    ("kyma", ("kymaapi.com",)),
    ("lambda", ("api.lambda.ai", "api.lambdalabs.com")),
    ("libertai", ("api.libertai.io",)),
    ("lilac", ("api.getlilac.com",)),
    ("llamagate", ("api.llamagate.dev",)),
    ("llmgateway", ("api.llmgateway.io",)),
    ("llmtr", ("llmtr.com",)),
    ("lucidquery", ("api.lucidquery.com",)),
    ("meganova", ("api.meganova.ai",)),
    ("merge_gateway", ("api-gateway.merge.dev",)),
    ("mixlayer", ("models.mixlayer.ai",)),
    ("moark", ("moark.com", "ai.gitee.com")),
    ("modal", ("inference.us-west.modal.direct",)),
    ("modelis", ("modelishub.com",)),
    ("modeloracle", ("api.modeloracle.com",)),
    ("modelscope", ("api-inference.modelscope.cn",)),
    ("nadir", ("api.getnadir.com",)),
    ("nano_gpt", ("nano-gpt.com",)),
    ("nearai", ("cloud-api.near.ai",)),
    ("neosantara", ("api.neosantara.xyz",)),
    ("neuralwatt", ("api.neuralwatt.com",)),
    ("nscale", ("inference.api.nscale.com",)),
    ("ofox", ("api.ofox.ai",)),
    ("opencode", ("opencode.ai",)),
    ("openinfer", ("api.openinfer.ai",)),
    ("orcarouter", ("api.orcarouter.ai",)),
    ("parasail", ("api.parasail.io",)),
    ("pinstripes", ("pinstripes.io",)),
    ("pioneer", ("api.pioneer.ai",)),
    ("poe", ("api.poe.com",)),
    ("ppio", ("api.ppinfra.com",)),
    ("prism", ("api.prisminference.com",)),
    ("publicai", ("api.publicai.co",)),
    ("qihang", ("api.qhaigc.net",)),
    ("qiniu", ("api.qnaigc.com",)),
    ("redpill", ("api.redpill.ai",)),
    ("refuseless", ("api.refuseless.com",)),
    ("regolo", ("api.regolo.ai",)),
    ("roocode", ("api.roocode.com",)),
    ("routing_run", ("ai.routing.sh", "api.routing.run")),
    ("runanywhere", ("inference.runanywhere.ai",)),
    ("runinfra", ("api.runinfra.ai",)),
    ("sail", ("api.sailresearch.com",)),
    ("scnet", ("api.scnet.cn",)),
    ("scx", ("api.scx.ai",)),
    ("stackit", ("api.openai-compat.model-serving.eu01.onstackit.cloud",)),
    ("stima", ("api.stima.tech",)),
    ("subconscious", ("api.subconscious.dev",)),
    ("submodel", ("llm.submodel.ai",)),
    ("synthetic", ("api.synthetic.new",)),
    ("targon", ("api.targon.com",)),
    ("tensormesh", ("serverless.tensormesh.ai",)),
    ("tensorx", ("api.tensorx.ai",)),
    ("the_grid", ("api.thegrid.ai",)),
    ("tinfoil", ("inference.tinfoil.sh",)),
    ("trustedrouter", ("api.trustedrouter.com",)),
    ("umans", ("api.code.umans.ai",)),
    ("unorouter", ("api.unorouter.com",)),
    ("vivgrid", ("api.vivgrid.com",)),
    ("vultr", ("api.vultrinference.com",)),
    ("wafer", ("pass.wafer.ai",)),
    ("wandb", ("api.inference.wandb.ai",)),
    ("xpersona", ("www.xpersona.co",)),
    ("zeldoc", ("api.zeldoc.ai",)),
    ("zenifra", ("ai.zenifra.com",)),
    ("zenmux", ("zenmux.ai",)),
    ("zerogpu", ("api.zerogpu.ai",)),
)  # fmt: skip

# Hosts that carry much else: read from captures, never asked of the kernel unless configured.
_AMONG_ELSE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("databricks", (
        "*.cloud.databricks.com", "*.azuredatabricks.net", "*.gcp.databricks.com",
    )),
    ("gitlab", ("cloud.gitlab.com",)),
    ("github_copilot", ("copilot-proxy.githubusercontent.com", "*.ghe.com")),
    ("sap_ai_core", ("*.ml.hana.ondemand.com",)),
    ("infomaniak", ("api.infomaniak.com",)),
    ("amd", ("developer.amd.com.cn",)),
)  # fmt: skip

# Oracle opens a host a region. The maker's own path names the region's cloud, not the model's.
_OCI_REGIONS = (
    *("us-chicago-1", "us-ashburn-1", "us-phoenix-1", "eu-frankfurt-1", "uk-london-1"),
    *("ap-osaka-1", "ap-tokyo-1", "ap-hyderabad-1", "ap-mumbai-1", "ap-melbourne-1"),
    *("ap-sydney-1", "ap-singapore-1", "ap-seoul-1", "sa-saopaulo-1", "me-dubai-1"),
    *("me-riyadh-1", "ca-toronto-1", "eu-paris-1", "eu-zurich-1"),
)
_OCI_PATH = r"(?:/openai/v1|/\d{8}/actions/v1)"
OCI = Provider(
    "oci",
    tuple(f"inference.generativeai.{region}.oci.oraclecloud.com" for region in _OCI_REGIONS),
    (
        *text_routes(_OCI_PATH),
        *(
            replace(each, path=re.compile("/anthropic" + each.path.pattern))
            for each in ANTHROPIC_ROUTES
        ),
    ),
    host_pattern=re.compile(
        r"(?:[a-z]+\.)?inference\.generativeai\.[^.]+\.oci\.(?:[a-z]+\.)?oraclecloud\.com"
    ),
)
# Two coding agents send the makers' own APIs through their maker's host.
AGENTS = (
    compatible("amp", ("ampcode.com",)),
    Provider("amp", ("ampcode.com",), content_routes(r"/api/provider/google/v1[^/]*(?:/[^?:]+)?")),
    replace(
        compatible("factory", ("app.factory.ai",)),
        routes=planned(compatible("factory", ()).routes, "factory"),
    ),
)
# Helicone's older proxies pass one maker's API on at its prices, each under a host of its own.
PASSED_ON = (
    Provider("openai", ("oai.helicone.ai", "oai.hconeai.com"), OPENAI_ROUTES),
    Provider("anthropic", ("anthropic.helicone.ai", "anthropic.hconeai.com"), ANTHROPIC_ROUTES),
)

# Resellers that bill in other money (yuan, euros, points): a cost that they stated is no dollars.
_NOT_IN_USD = frozenset(
    (
        "302ai aki_io berget cloudferro cortecs dmxapi drun ebcloud evroc greenpt hetzner "
        "huawei infini kenari kuae_cloud llmtr moark modelscope neosantara poe ppio qihang "
        "qiniu regolo scnet stackit zenifra"
    ).split()
)

PROVIDERS = (
    *(compatible(name, hosts) for name, hosts in _MAKERS),
    *(compatible(name, hosts, states_cost=name not in _NOT_IN_USD) for name, hosts in _RESELLERS),
    *(compatible(name, hosts, captured=False) for name, hosts in _AMONG_ELSE),
    OCI,
    *AGENTS,
    *PASSED_ON,
)
