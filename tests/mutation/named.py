"""Wrong versions of the training's mathematics, by name: replacements of source text that a test must refuse.

They are mistakes that a reader could make, not random edits. `old` occurs exactly once in its file, so a change of
those lines must also change this list; test_named.py checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Named:
    """One wrong version.

    Attributes:
        name: the mistake, in words.
        file: the file that it changes, from the top of the repository.
        old: text that occurs once in the file.
        new: the text in its place.
        tests: test files; at least one of them fails with the wrong version.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def in_file(file: str, tests: str) -> Callable[[str, str, str], Named]:
    """Return a function (name, old, new) -> Named for one file and its test file in tests/components."""

    def named(name: str, old: str, new: str) -> Named:
        return Named(name=name, file=file, old=old, new=new, tests=(f"tests/components/{tests}",))

    return named


BY_HAND = "test_instantir_objectives_by_hand.py"
objectives = in_file("components/systems/instantir/objectives.py", BY_HAND)
network = in_file("components/systems/instantir/network.py", BY_HAND)
diffusion = in_file("components/objectives/diffusion.py", BY_HAND)
consistency = in_file("components/objectives/consistency.py", BY_HAND)
precomputed = in_file("components/objectives/precomputed.py", BY_HAND)
guidance = in_file("components/samplers/guidance.py", BY_HAND)
prior = in_file("components/systems/prior/training.py", "test_prior_objectives_by_hand.py")
flow = in_file("components/samplers/flow.py", "test_flow.py")
matching = in_file("components/objectives/flow_matching.py", "test_flow.py")
pull = in_file("components/samplers/restoration_pull.py", "test_restoration_pull.py")
ddim = in_file("components/samplers/ddim.py", "test_restoration_pull.py")
edm = in_file("components/samplers/edm.py", "test_restoration_pull.py")
pulled_flow = in_file("components/samplers/flow.py", "test_restoration_pull.py")
adapters = in_file("components/systems/dra/adapters.py", "test_dra.py")
variants = in_file("components/systems/dra/objectives.py", "test_dra.py")
denoiser = in_file("components/systems/dra/denoiser.py", "test_dra_restorer.py")
control = in_file("components/systems/dra/control.py", "test_dra_control.py")
tokens = in_file("components/systems/dra/tokens.py", "test_dra_tokens.py")
token_loss = in_file("components/systems/dra/objectives.py", "test_dra_tokens.py")
token_adapters = in_file("components/systems/dra/adapters.py", "test_dra_tokens.py")
mmdit = in_file("components/priors/mmdit_walk.py", "test_dra_tokens.py")
flow_denoiser = in_file("components/systems/dra/denoiser.py", "test_dra_tokens.py")
workers = in_file("components/training.py", "test_training_workers.py")

TARGET = """        conditions = textless
        with torch.no_grad():
            target = self.network.preview(previous, end, conditions)
        student = self.network.preview(noisy, start, conditions)
"""
"""The previewer's target and student; several wrong versions replace these lines."""


def target(name: str, *lines: str) -> Named:
    """A wrong version of TARGET: its lines without their indentation of eight blanks."""
    return objectives(name, TARGET, "".join(f"        {line}\n" for line in lines))


NO_GRAD, RIGHT_TARGET = "with torch.no_grad():", "    target = self.network.preview(previous, end, textless)"
RIGHT_STUDENT = "student = self.network.preview(noisy, start, textless)"

PREVIEWER = (
    target(
        "previewer: student sees the prompt",
        NO_GRAD,
        RIGHT_TARGET,
        "student = self.network.preview(noisy, start, conditions)",
    ),
    target(
        "previewer: target sees the prompt",
        NO_GRAD,
        "    target = self.network.preview(previous, end, conditions)",
        RIGHT_STUDENT,
    ),
    target(
        "previewer: target previewed at the start",
        NO_GRAD,
        "    target = self.network.preview(previous, start, textless)",
        RIGHT_STUDENT,
    ),
    target(
        "previewer: student previewed at the end",
        NO_GRAD,
        RIGHT_TARGET,
        "student = self.network.preview(noisy, end, textless)",
    ),
    target("previewer: target keeps its gradient", "if True:", RIGHT_TARGET, RIGHT_STUDENT),
    target(
        "previewer: student without a gradient",
        NO_GRAD,
        "    student = self.network.preview(noisy, start, textless)",
        "target = self.network.preview(previous, end, textless)",
    ),
    target("previewer: target is the clean latent", "target = clean", RIGHT_STUDENT),
    target(
        "previewer: target previewed from the start's latents",
        NO_GRAD,
        "    target = self.network.preview(noisy, end, textless)",
        RIGHT_STUDENT,
    ),
    target(
        "previewer: student without the picture",
        NO_GRAD,
        RIGHT_TARGET,
        "blank = self.network.prior.null_image_tokens(len(noisy))",
        "student = self.network.preview(noisy, start, replace(textless, image_tokens=blank))",
    ),
    target(
        "previewer: target without the picture",
        "blank = self.network.prior.null_image_tokens(len(noisy))",
        NO_GRAD,
        "    target = self.network.preview(previous, end, replace(textless, image_tokens=blank))",
        RIGHT_STUDENT,
    ),
    network(
        "previewer: teacher with the LoRA on",
        "with previewer_enabled(self.unet, False):",
        "with previewer_enabled(self.unet, True):",
    ),
    network(
        "previewer: preview with the LoRA off",
        "with previewer_enabled(self.unet):",
        "with previewer_enabled(self.unet, False):",
    ),
    objectives(
        "previewer: teacher without its prompt",
        "eps = self.network.denoise_eps(noisy, start, conditions)",
        "eps = self.network.denoise_eps(noisy, start, textless)",
    ),
    objectives(
        "previewer: teacher at the end's time",
        "eps = self.network.denoise_eps(noisy, start, conditions)",
        "eps = self.network.denoise_eps(noisy, end, conditions)",
    ),
    guidance("previewer: guidance reversed", ") * (positive - negative)", ") * (negative - positive)"),
    objectives(
        "previewer: noise's guidance reversed",
        "distillation_guide(eps_unconditional, eps, w)",
        "distillation_guide(eps, eps_unconditional, w)",
    ),
    guidance(
        "previewer: guidance starts at the unguided half",
        "return positive + w.view(",
        "return negative + w.view(",
    ),
    objectives(
        "previewer: solver's noise is not guided",
        "eps = distillation_guide(eps_unconditional, eps, w)",
        "eps = eps.clone()",
    ),
    objectives(
        "previewer: solver's clean latents are not guided",
        "clean = distillation_guide(schedule.x0_from_eps(noisy, eps_unconditional, start), clean, w)",
        "clean = clean.clone()",
    ),
    objectives(
        "previewer: teacher's unguided half sees the prompt",
        "unconditional = replace(textless, image_tokens=blank)",
        "unconditional = replace(conditions, image_tokens=blank)",
    ),
    objectives(
        "previewer: teacher's unguided half sees the picture",
        "unconditional = replace(textless, image_tokens=blank)",
        "unconditional = textless",
    ),
    objectives(
        "previewer: guidance from 1 instead of the range's low end",
        '"guidance", *self.guidance_range)',
        '"guidance", 1.0, self.guidance_range[1])',
    ),
    objectives(
        "previewer: the same guidance for all samples",
        '"guidance", *self.guidance_range).to(noisy.dtype)',
        '"guidance", *self.guidance_range).to(noisy.dtype)[:1].expand(len(noisy))',
    ),
    objectives(
        "previewer: solver stays at the start",
        "return ddim_step(schedule, clean, eps, end)",
        "return ddim_step(schedule, clean, eps, start)",
    ),
    objectives(
        "previewer: solver ends at time 0",
        "return ddim_step(schedule, clean, eps, end)",
        "return clean",
    ),
    objectives(
        "previewer: noise of another name",
        'noise.normal("noise", tuple(clean.shape[1:])), start)',
        'noise.normal("guidance", tuple(clean.shape[1:])), start)',
    ),
    objectives(
        "previewer: Huber and squares swapped",
        "if self.huber_c is None else pseudo_huber(student, target, self.huber_c)",
        "if self.huber_c is not None else pseudo_huber(student, target, 0.001)",
    ),
    objectives("previewer: sum over the samples", "value = distances.mean()", "value = distances.sum()"),
    objectives(
        "previewer: error from the target instead of the HQ latents",
        "squared_distance(student.detach(), clean)",
        "squared_distance(student.detach(), target)",
    ),
    consistency("previewer: Huber without its offset", "+ c**2).sqrt() - c)", "+ c**2).sqrt())"),
    consistency("previewer: grid starts at 0", "(index + 1) * self.stride - 1", "index * self.stride"),
    consistency("previewer: interval of two strides", "(start - self.stride)", "(start - 2 * self.stride)"),
    consistency("previewer: last interval ends at time 1", ".clamp_min(0)", ".clamp_min(1)"),
    consistency("previewer: preview without c_skip", " + skip.view(shape) * noisy)", ")"),
    consistency("previewer: boundary ten times as wide", "timesteps.to(torch.float32) * timestep_scaling", "timesteps"),
)

CONDITIONS = (
    objectives(
        "conditions: picture dropped where text should be",
        "prior.null_image_tokens(len(batch)), drop.image)",
        "prior.null_image_tokens(len(batch)), drop.text)",
    ),
    objectives("conditions: text dropped where the picture should be", "drop.text.tolist()", "drop.image.tolist()"),
    objectives(
        "conditions: precomputed text dropped where the picture should be",
        "embed_batch_prompts(prior, batch, drop.text,",
        "embed_batch_prompts(prior, batch, drop.image,",
    ),
    objectives(
        "conditions: dropped picture as zeros, not the null image",
        "replace_rows(tokens, prior.null_image_tokens(len(batch)), drop.image)",
        "replace_rows(tokens, torch.zeros_like(tokens), drop.image)",
    ),
    objectives("conditions: perceptor sees HQ", "prior.embed_images(batch.lq)", "prior.embed_images(batch.hq)"),
    objectives(
        "conditions: sizes of another sample", "prior.time_ids(batch.sizes)", "prior.time_ids(batch.sizes.flip(0))"
    ),
    objectives(
        "conditions: sizes left out",
        "prior.time_ids(batch.sizes)",
        "prior.time_ids(torch.zeros_like(batch.sizes))",
    ),
    objectives(
        "conditions: dropout from another stream",
        'drop_conditions(noise.uniform("conditions")',
        'drop_conditions(noise.uniform("guidance")',
    ),
    diffusion(
        "conditions: both counted twice",
        "none_above = image + text + both",
        "none_above = image + text + 2 * both",
    ),
    diffusion(
        "conditions: both drops the picture alone",
        "text=((uniform >= image) & (uniform < image + text)) | drop_both",
        "text=(uniform >= image) & (uniform < image + text)",
    ),
    diffusion(
        "conditions: both drops the text alone",
        "image=(uniform < image) | drop_both",
        "image=uniform < image",
    ),
    precomputed(
        "conditions: precomputed text is never dropped",
        "replace_rows(old, new.to(old.dtype), dropped)",
        "replace_rows(old, new.to(old.dtype), torch.zeros_like(dropped))",
    ),
    precomputed("conditions: precomputed latents of missing rows", "if not batch.latents_missing:", "if True:"),
)

DIFFUSION_LOSS = (
    diffusion(
        "diffusion loss: noise target changed to clean latents",
        "timesteps), target, timesteps",
        "timesteps), clean, timesteps",
    ),
    diffusion(
        "diffusion loss: velocity as target",
        "timesteps), target, timesteps",
        "timesteps), target - clean, timesteps",
    ),
    diffusion(
        "diffusion loss: max_clean_weight ignored",
        "clean_weights(schedule, max_clean_weight)",
        "clean_weights(schedule, 1.0)",
    ),
    diffusion("diffusion loss: noise_offset ignored", "offsets, self.noise_offset)", "offsets, 0.0)"),
    diffusion(
        "diffusion loss: offset not in the target",
        "timesteps), target, timesteps",
        'timesteps), noise.normal("noise", tuple(clean.shape[1:])), timesteps',
    ),
    diffusion("diffusion loss: offset of each pixel", "(clean.shape[1], 1, 1))", "tuple(clean.shape[1:]))"),
    diffusion("diffusion loss: timestep_importance ignored", "* importance\n", "* importance**0\n"),
    diffusion("diffusion loss: clean steps important", "1 - strength * torch.cos", "1 + strength * torch.cos"),
    diffusion(
        "diffusion loss: weights of the next time step", "plain.device)[timesteps]", "plain.device)[timesteps - 1]"
    ),
    diffusion("diffusion loss: weights not of mean 1", "self.weights / self.weights.mean()", "self.weights * 1"),
    diffusion("diffusion loss: weight by signal", "(1 / schedule.alphas_cumprod)", "(schedule.alphas_cumprod + 1)"),
    diffusion("diffusion loss: last time step never drawn", "0, self.schedule.num_train_timesteps)", "0, 999)"),
    diffusion(
        "diffusion loss: latents noised for the next time step",
        "self.schedule.add_noise(clean, target, timesteps)",
        "self.schedule.add_noise(clean, target, (timesteps + 1).clamp(max=999))",
    ),
)

AGGREGATOR = (
    objectives("aggregator: sees HQ instead of LQ", "lq = self._encode(batch.lq)", "lq = self._encode(batch.hq)"),
    objectives(
        "aggregator: LQ latents and preview swapped",
        "residuals(lq, timesteps, reference, conditions)",
        "residuals(reference, timesteps, lq, conditions)",
    ),
    objectives(
        "aggregator: reference is the noisy latents",
        "residuals(lq, timesteps, reference, conditions)",
        "residuals(lq, timesteps, noisy, conditions)",
    ),
    objectives(
        "aggregator: reference is the clean latents",
        "residuals(lq, timesteps, reference, conditions)",
        "residuals(lq, timesteps, clean, conditions)",
    ),
    objectives(
        "aggregator: residuals at time 0",
        "residuals(lq, timesteps, reference, conditions)",
        "residuals(lq, 0 * timesteps, reference, conditions)",
    ),
    objectives(
        "aggregator: residuals doubled",
        "noisy, timesteps, conditions, residuals), target",
        "noisy, timesteps, conditions, residuals.scale_by(2.0)), target",
    ),
    objectives(
        "aggregator: prior without text",
        "noisy, timesteps, conditions, residuals), target",
        "noisy, timesteps, self.without_text(conditions, batch), residuals), target",
    ),
    objectives(
        "aggregator: previews at time 0",
        "reference = network.preview(noisy, timesteps, conditions)",
        "reference = network.preview(noisy, 0 * timesteps, conditions)",
    ),
    objectives(
        "aggregator: previews by the prior, without the LoRA",
        "reference = network.preview(noisy, timesteps, conditions)",
        "reference = network.prior.schedule.x0_from_eps("
        "noisy, network.denoise_eps(noisy, timesteps, conditions), timesteps)",
    ),
    objectives(
        "aggregator: reference lq is a preview",
        'if self.reference == "lq":',
        'if self.reference == "":',
    ),
    objectives(
        "aggregator: preview_cfg_scale does not guide",
        "network.preview(noisy, timesteps, unconditional), reference, scale)",
        "network.preview(noisy, timesteps, unconditional), reference, 1.0)",
    ),
    objectives(
        "aggregator: guidance of previews reversed",
        "guide(network.preview(noisy, timesteps, unconditional), reference, scale)",
        "guide(reference, network.preview(noisy, timesteps, unconditional), scale)",
    ),
    objectives(
        "aggregator: unguided previews see the picture",
        "replace(self.without_text(conditions, batch), image_tokens=blank)",
        "self.without_text(conditions, batch)",
    ),
    objectives(
        "aggregator: unguided previews see the prompt",
        "replace(self.without_text(conditions, batch), image_tokens=blank)",
        "replace(conditions, image_tokens=blank)",
    ),
    objectives(
        "aggregator: reference noise at another time",
        "reference, fresh, timesteps)",
        "reference, fresh, timesteps // 2)",
    ),
    objectives(
        "aggregator: reference has the latents' noise",
        "noise.normal(REFERENCE_NOISE, tuple(lq.shape[1:]))",
        'noise.normal("noise", tuple(lq.shape[1:]))',
    ),
    objectives("aggregator: reference_noise ignored", "if self.reference_noise:", "if False:"),
)

PRIOR = (
    prior("prior: autoencoder without jitter", "self.prior.decode(latents + jitter)", "self.prior.decode(latents)"),
    prior("prior: autoencoder reconstructs LQ", "+ jitter) - batch.hq", "+ jitter) - batch.lq"),
    prior(
        "prior: PSNR over a range of 1",
        "(error.detach().square().mean(dim=(1, 2, 3)).clamp_min(1e-10) / 4)",
        "(error.detach().square().mean(dim=(1, 2, 3)))",
    ),
    prior(
        "prior: encoder compares LQ with LQ", "self.prior.embed_images(batch.hq)", "self.prior.embed_images(batch.lq)"
    ),
    prior(
        "prior: contrast in one direction",
        "F.cross_entropy(logits.T, target)) / 2",
        "F.cross_entropy(logits, target)) / 2",
    ),
    prior("prior: temperature multiplies", "similarity / self.temperature", "similarity * self.temperature"),
    prior("prior: colours of LQ", "F.interpolate(batch.hq, (side", "F.interpolate(batch.lq, (side"),
    prior("prior: colours of the next patch", "self.readout(lq[:, 1:])", "self.readout(lq[:, 1:].roll(1, 1))"),
    prior("prior: class token counts as a patch", "self.readout(lq[:, 1:])", "self.readout(lq[:, :-1])"),
    prior("prior: denoiser never drops the text", '"text_dropout") < text_dropout', '"text_dropout") < 0.0'),
    prior(
        "prior: pooled vector dropped with the text's draw",
        'noise.uniform("pooled_dropout") <',
        'noise.uniform("text_dropout") <',
    ),
    prior(
        "prior: pooled vector dropped as zeros",
        "replace_rows(pooled, empty_prompt,",
        "replace_rows(pooled, 0 * pooled,",
    ),
    prior(
        "prior: denoiser learns the clean latents", "self.loss(prediction, eps, t)", "self.loss(prediction, latents, t)"
    ),
)

FLOW = (
    flow("flow: shares swapped", "(1 - share) * clean + share * noise", "share * clean + (1 - share) * noise"),
    flow("flow: velocity towards the clean latents", "    return noise - clean\n", "    return clean - noise\n"),
    flow(
        "flow: noise estimate with the share of noise", "latents + (1 - _as_rows(sigma", "latents + (0 + _as_rows(sigma"
    ),
    flow("flow: clean estimate from the wrong side", "latents - _as_rows(sigma", "latents + _as_rows(sigma"),
    flow(
        "flow: steps away from the clean latents", "(following - sigma) * direction", "(sigma - following) * direction"
    ),
    flow("flow: halves of guidance swapped", "negative, positive = predict", "positive, negative = predict"),
    flow("flow: shift towards the clean latents", "shift * times / (1 + (shift - 1)", "times / (1 + (shift - 1)"),
    flow("flow: last time without its shift", "shift_times(torch.tensor(1 / ", "(lambda t, s: t)(torch.tensor(1 / "),
    matching("flow: times of a normal distribution", "torch.sigmoid(mean + deviation", "(mean + deviation"),
    matching("flow: noise as the target", "path_velocity(clean.float(), noise.float())", "noise.float()"),
)

WORKERS = (
    workers("workers: gradients summed, not averaged", "    flat /= dist.get_world_size()\n    any_", "    any_"),
    workers(
        "workers: gradients of one worker",
        "    dist.all_reduce(flat)\n    flat /= dist.get_world_size()\n    any_",
        "    any_",
    ),
    workers(
        "workers: the mean over the workers that have the gradient",
        "    offset = len(parameters)\n",
        "    offset = len(parameters)\n"
        "    counts = torch.tensor([g.numel() for g in gradients])\n"
        "    shares = flat[:offset].clamp_min(0.1).repeat_interleave(counts)\n"
        "    flat = flat / torch.cat([torch.ones(offset), shares])\n",
    ),
    workers("workers: no gradient becomes zero", "gradient.dtype) if is_any else None", "gradient.dtype)"),
    workers("workers: a gradient of one worker alone is lost", "len(parameters)] > 0)", "len(parameters)] > 0.99)"),
    workers("workers: offsets of the flat gradient", "offset += count", "offset += 1"),
    workers("workers: metrics summed", "    flat /= dist.get_world_size()\n    return dict", "    return dict"),
    workers("workers: metrics in each worker's own order", "names = sorted(metrics)", "names = list(metrics)"),
)

RESTORATION_PULL = (
    pull("pull: away from LQ", "weight * (target - latents)", "weight * (latents - target)"),
    pull("pull: steps counted before the step", "return steps - 1 - step", "return steps - step"),
    pull("pull: share not stretched to 1", "(share - threshold) / (1 - threshold)", "(share - threshold)"),
    pull("pull: the threshold's other side", "if share > threshold else", "if share < threshold else"),
    pull("pull: renoised without the noise", " + noise_share * self.noise, strength", ", strength"),
    pull("pull: renoised to the whole LQ", "signal_share * self.target +", "self.target +"),
    pull("pull: latents that keep their own scale", "scale * self.target", "self.target"),
    pulled_flow("pull: the flow's noise moves too", "(1 - following) * (pulled - clean)", "(pulled - clean)"),
    pulled_flow("pull: the flow's whole LQ", "signal_share=1 - following)", "signal_share=1.0)"),
    ddim(
        "pull: DDIM's latents at the level before",
        "(1 + following.square()).sqrt()  #",
        "(1 + sigma.square()).sqrt()  #",
    ),
    edm(
        "pull: EDM's clean estimate moves after the step",
        """            clean = restoration.clean(step, steps, clean)
        latents = latents + (latents - clean) / sigma * (following - sigma)
""",
        """            pass
        latents = latents + (latents - clean) / sigma * (following - sigma)
""",
    ),
)

ADAPTERS = (
    adapters("adapters: the last layer is not zero", "nn.init.zeros_(parameter)", "pass"),
    adapters(
        "adapters: without the prior's own output", "return x + adapter.out(hidden)", "return adapter.out(hidden)"
    ),
    adapters("adapters: no residual sum", "hidden = hidden + adapter.r2(hidden)", "hidden = adapter.r2(hidden)"),
    adapters("adapters: the time embedding is lost", ").flatten(0, 1) + spread", ").flatten(0, 1) + 0 * spread"),
    adapters(
        "adapters: always L to the next one",
        "adapter.lq(resample(self._hidden,",
        "adapter.lq(resample(self._features[-1],",
    ),
    adapters("adapters: both places of SiLU alike", 'if self.silu == "before" else', "if self.silu else"),
    variants("variants: no null text", "null = uniform < null_share", "null = uniform < 0"),
    variants("variants: the LQ variant overlaps the null one", "lq = ~null & (", "lq = ("),
    variants(
        "variants: HQ as the target of all", "self.prior.encode(batch.lq[rows])", "self.prior.encode(batch.hq[rows])"
    ),
    variants(
        "variants: the robust encoder's target",
        "self.prior.encode(batch.lq[rows])",
        "self.network.encode_lq(batch.lq[rows])",
    ),
    variants(
        "variants: HQ as the condition",
        "else self.network.encode_lq(batch.lq)",
        "else self.network.encode_lq(batch.hq)",
    ),
    variants(
        "variants: learns the clean latents", "self.loss(eps, target, timesteps)", "self.loss(eps, clean, timesteps)"
    ),
    denoiser("noise: halves swapped", "chunk(2)\n        return latents", "chunk(2)[::-1]\n        return latents"),
    denoiser("velocity: halves swapped", "chunk(2)\n        return guide", "chunk(2)[::-1]\n        return guide"),
    denoiser("denoiser: LQ features of each step", "    @cached_property\n", "    @property\n"),
)

TOKENS = (
    mmdit("tokens: the text does not pass from block to block", "text if after is None else after", "text"),
    mmdit(
        "tokens: joins see the block before",
        "joins.after_block(number, tokens)",
        "joins.after_block(number - 1, tokens)",
    ),
    tokens("tokens: times in (0, 1] to the embedding", " * self.prior.schedule.num_train_timesteps", ""),
    token_adapters(
        "tokens: adapters before their block",
        "return [self.config.every * (number + 1) - 1 for",
        "return [self.config.every * number for",
    ),
    token_loss(
        "tokens: noise at other times than the network's",
        "noisy_latents(clean, eps, times), times,",
        "noisy_latents(clean, eps, 1 - times), times,",
    ),
    token_loss(
        "tokens: the prompts of the batch",
        "self.prior.conditions(variants.prompts)",
        "self.prior.conditions(batch.prompts)",
    ),
    token_loss(
        "tokens: learns the clean latents",
        "flow_matching_loss(velocity, clean, eps)",
        "flow_matching_loss(velocity, eps, clean)",
    ),
    flow_denoiser(
        "tokens: guidance is lost",
        "both.chunk(2)\n        return guide(negative, positive, self.cfg_scale)",
        "both.chunk(2)\n        return positive",
    ),
    control("control: skips in the wrong order", "self._additions.pop()", "self._additions.pop(0)"),
    control(
        "control: an addition after the last block", "if number == self._blocks - 1:", "if number == self._blocks:"
    ),
    control("control: the first additions alone", "number * len(self._additions) // self._blocks", "0"),
    flow_denoiser("tokens: LQ features of each step", "    @cached_property\n", "    @property\n"),
)

NAMED: tuple[Named, ...] = (
    *PREVIEWER,
    *CONDITIONS,
    *DIFFUSION_LOSS,
    *AGGREGATOR,
    *PRIOR,
    *FLOW,
    *WORKERS,
    *RESTORATION_PULL,
    *ADAPTERS,
    *TOKENS,
)
"""Every wrong version; make mutate applies each to a copy of the repository and runs its tests."""
