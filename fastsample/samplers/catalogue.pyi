"""The list of all samplers, written from their classes by `python -m support.catalogue_stub`, run in tests/."""

from collections.abc import Iterable, Sequence

from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.options import CorrectX0, Decode, Decoded, Undecoded
from fastsample.model import Model
from fastsample.samplers.consistency import Consistency
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.ddpm import DDPM, Variance
from fastsample.samplers.deis import DEIS, DEISVariant
from fastsample.samplers.dpm_solver import DPMSolver
from fastsample.samplers.euler import Euler, EulerAncestral
from fastsample.samplers.heun import Heun
from fastsample.samplers.inversion import Convention, DDIMInverse, EulerInverse
from fastsample.samplers.ipndm import IPNDM
from fastsample.samplers.lcm import LCM
from fastsample.samplers.limits import Clip
from fastsample.samplers.tcd import TCD
from fastsample.samplers.unipc import UniPC, UniPCVariant
from fastsample.schedule import Schedule
from fastsample.times.predictions import Prediction
from fastsample.times.solver_timesteps import Times
from fastsample.times.timesteps import Timesteps

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "LCM",
    "TCD",
    "Consistency",
    "DDIMInverse",
    "DPMSolver",
    "Euler",
    "EulerAncestral",
    "EulerInverse",
    "Heun",
    "UniPC",
    "consistency",
    "ddim",
    "ddim_invert",
    "ddpm",
    "deis",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "euler_invert",
    "heun",
    "ipndm",
    "lcm",
    "tcd",
    "unipc",
]

def consistency(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    sigmas: Iterable[float] = (80.0,),
    sigma_min: float = 0.002,
    sigma_data: float = 0.5,
    clip: Clip = 1.0,
    correct_x0: CorrectX0 | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples from a consistency model (Song et al. 2023), in one step or in one per entry of `sigmas`.

    At noise level sigma (x = clean + sigma z), on the way to the next one, sigma':

        c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2)
        c_out  = (sigma - sigma_min) sigma_data / sqrt(sigma^2 + sigma_data^2)
        c_in   = 1 / sqrt(sigma^2 + sigma_data^2)
        x0     = c_skip x + c_out model(c_in x, 250 ln sigma)
        x'     = x0 + sqrt(sigma'^2 - sigma_min^2) z

    and x0 is the result of the last one. This is what consistency_models' stochastic_iterative_sampler and diffusers'
    CMStochasticIterativeScheduler compute.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            Here it is called as model(c_in x, t, **model_kwargs), t float32 of shape (B,).
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
            Drawn noise is multiplied by sigmas[0], and a given x_T lies at that level.
        sigmas: the noise levels at which the model is called, descending: some of those that it was trained on, such as
            karras_sigmas(80.0, 0.002, 40)[[0, 22]]: "ts 0,22,39" of consistency_models, timesteps=[22, 0] of diffusers.
        sigma_min: as in training.
        sigma_data: as in training.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            1 in both peers.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.Consistency, whose table takes some 0.3 ms to make.
    See `Consistency.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for sigmas that do not descend or fall below sigma_min, and for a scale that is not positive.

    Example:
        >>> from fastsample import karras_sigmas
        >>> sigmas = karras_sigmas(80.0, 0.002, 40)[[0, 22]]
        >>> consistency(lambda x, t: 0.1 * x, (2, 3, 8, 8), sigmas=sigmas, seed=0).shape
        torch.Size([2, 3, 8, 8])
        >>> sampler = Consistency(sigmas=sigmas)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

def ddim(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "auto",
    eta: float = 0.0,
    prediction: Prediction | None = None,
    clip: Clip = None,
    rederive_epsilon: bool = True,
    correct_x0: CorrectX0 | None = None,
    final_alpha_cumprod: float = 1.0,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples from a diffusion model with DDIM (Song, Meng & Ermon 2020).

    From timestep t to the next entry of the list, t' (not t - T // N), with alpha bars a and a':

        x0 = (x - sqrt(1 - a) epsilon) / sqrt(a)
        s  = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')
        x' = sqrt(a') x0 + sqrt(1 - a' - s^2) epsilon + s z

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` names a spacing; otherwise ignored. A single step is from timestep T - 1
            under every name but "auto" (spaced_timesteps gives the peers' lists).
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
        timesteps: which timesteps to visit. "auto" is round((1 - k / N) (t0 + 1)) - 1, k = 0 .. N - 1. t0 is T - 1 for
            v and x0 models, and where sigma / alpha is at most 16 there, as for Stable Diffusion; else the noisiest
            timestep whose first step makes at most 6 times as much of an error in epsilon. fastsample.spaced_timesteps
            has the spacings of other libraries by name; "ays_sd15" or "ays_sdxl": Align Your Steps; or the timesteps
            themselves, such as those of fastsample.optimal_timesteps.
            Stable Diffusion's own are spaced_timesteps(1000, steps=steps, steps_offset=1), with
            final_alpha_cumprod=schedule.alphas_cumprod[0].
        eta: 0 is deterministic, 1 is ancestral sampling; larger values as far as 1 - a' >= s^2.
        prediction: what the model predicts: "epsilon", "v" (sqrt(a) epsilon - sqrt(1 - a) x0) or "x0"; default
            `model.prediction`, found as the schedule is, else "epsilon".
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            Needed where a list's first timestep is next to pure noise (a cosine schedule's last) and nothing else
            limits x0; the default's is not. To clip as diffusers does, set rederive_epsilon=False too.
        rederive_epsilon: after clipping or correction, take epsilon from the new x0 (improved-diffusion; diffusers'
            use_clipped_model_output). False keeps the model's own (diffusers' default).
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` as in Stable Diffusion.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.DDIM, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `DDIM.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: where eta is negative or so large that s^2 > 1 - a', for a clip that is not positive, and for a
            prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import Schedule
        >>> ddim(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = DDIM(Schedule.linear(), steps=10)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> for step in sampler.iterate(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1):
        ...     last = step.t
        >>> last
        99
    """

def ddim_invert(
    model: Model,
    x0: Tensor,
    *,
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "auto",
    convention: Convention = "mirror",
    prediction: Prediction | None = None,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Encodes clean samples as noise: DDIM's ODE (Song, Meng & Ermon 2020) run backwards.

    `ddim` with the same arguments, from the result, is the decoder; the error of the round trip is of the order of a
    step where the model is smooth. Where samples have large flat areas at -1 or 1 (drawings) it is not, and "improved"
    does better. From the level of alpha bar a to the noisier one a':

        x0 = (x - sqrt(1 - a) epsilon) / sqrt(a)
        x' = sqrt(a') x0 + sqrt(1 - a') epsilon

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
        x0: the clean samples, a tensor of float16, bfloat16, float32, or float64 for the reference backend. Never
            modified.
        steps: model calls, where `timesteps` names a spacing; otherwise ignored. A single step is from timestep T - 1
            under every name but "auto" (spaced_timesteps gives the peers' lists).
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
        timesteps: which timesteps to visit. "auto" is round((1 - k / N) (t0 + 1)) - 1, k = 0 .. N - 1. t0 is T - 1 for
            v and x0 models, and where sigma / alpha is at most 16 there, as for Stable Diffusion; else the noisiest
            timestep whose first step makes at most 6 times as much of an error in epsilon. fastsample.spaced_timesteps
            has the spacings of other libraries by name; "ays_sd15" or "ays_sdxl": Align Your Steps; or the timesteps
            themselves, such as those of fastsample.optimal_timesteps.
        convention: with the timesteps t_0 < t_1 < ... and their alpha bars a_0, a_1, ...
            - "mirror": from final_alpha_cumprod to a_0, a_1, ..., each with the model at the timestep that is reached:
              where `ddim` starts from, the levels it passes (diffusers' DDIMInverseScheduler);
            - "improved": x0 counts as level a_0; from a_k to a_(k+1) with the model at t_k, and from the last one to
              alpha bar 0 (improved-diffusion's ddim_reverse_sample).
        prediction: what the model predicts: "epsilon", "v" (sqrt(a) epsilon - sqrt(1 - a) x0) or "x0"; default
            `model.prediction`, found as the schedule is, else "epsilon".
            "mirror" needs final_alpha_cumprod < 1 for "x0". A flow is inverted by `euler_invert`.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            "mirror" keeps the model's epsilon then, "improved" takes it from the new x0, as the code that they
            follow.
        final_alpha_cumprod: that of the decoder; unused by "improved".
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.
            `strength`, `mask` and `known` are for sampling only.

    Calls with the same arguments share a fastsample.DDIMInverse, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `DDIMInverse.prepare` for short runs.

    Returns:
        The noise, float32 (float64 for a float64 x0), without gradients unless x0 requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for an unknown convention, and for a prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import Schedule, ddim
        >>> x0 = torch.ones(1, 3, 8, 8)
        >>> noise = ddim_invert(lambda x, t: 0.1 * x, x0, steps=100)
        >>> round(float(ddim(lambda x, t: 0.1 * x, noise, steps=100).mean()), 2)
        1.03
        >>> inverse = DDIMInverse(Schedule.linear(), steps=10)
        >>> inverse.table.t.tolist()
        [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    """

def ddpm(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "respaced",
    variance: Variance = "fixed_small",
    prediction: Prediction | None = None,
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Ancestral sampling (DDPM, Ho, Jain & Abbeel 2020) on any subset of the timesteps, as improved-diffusion does it.

    From timestep t to the next entry of the list, t', with alpha bars a and a' and the respaced beta = 1 - a / a':

        mean       = sqrt(a') beta / (1 - a) x0 + sqrt(1 - beta) (1 - a') / (1 - a) x
        beta_tilde = beta (1 - a') / (1 - a)
        x'         = mean + exp(log_variance / 2) z, without noise in the last row

    That is the posterior q(x' | x, x0) of the process that visits only these timesteps. In the table g0 and g1 hold
    half the log variance in every row; s is 1 in rows that add noise and 0 in the last one, whose variance serves the
    likelihood of the data alone (ops.posterior).

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            For a learned variance that half is v, and is read.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` names a spacing; otherwise ignored. A single step is from timestep T - 1
            under every name but "auto" (spaced_timesteps gives the peers' lists).
            None for all T.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
        timesteps: which timesteps to visit. "auto" is round((1 - k / N) (t0 + 1)) - 1, k = 0 .. N - 1. t0 is T - 1 for
            v and x0 models, and where sigma / alpha is at most 16 there, as for Stable Diffusion; else the noisiest
            timestep whose first step makes at most 6 times as much of an error in epsilon. fastsample.spaced_timesteps
            has the spacings of other libraries by name; "ays_sd15" or "ays_sdxl": Align Your Steps; or the timesteps
            themselves, such as those of fastsample.optimal_timesteps.
            The default is improved-diffusion's own spacing of `steps`.
        variance: with log_variance
            - "fixed_small": log beta_tilde;
            - "fixed_large": log beta;
            - "learned": v;
            - "learned_range": f log beta + (1 - f) log beta_tilde, f = (v + 1) / 2 (Nichol & Dhariwal 2021).

            The last row, where beta_tilde is 0, takes that of the row before (with fixed_large too).
        prediction: what the model predicts: "epsilon", "v" (sqrt(a) epsilon - sqrt(1 - a) x0) or "x0"; default
            `model.prediction`, found as the schedule is, else "epsilon".
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            Improved-diffusion's and diffusers' defaults are 1.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.DDPM, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `DDPM.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for an unknown variance or prediction, for a prediction that cannot work at one of the levels, and
            where alpha bar is 1 before the end.

    Example:
        >>> ddpm(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = DDPM(Schedule.linear(), steps=10)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> DDPM(Schedule.cosine(500), clip=1.0).steps
        500
    """

def deis(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 10,
    schedule: Schedule | None = None,
    timesteps: Times = "auto",
    prediction: Prediction | None = None,
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    order: int = 3,
    correct_x0: CorrectX0 | None = None,
    variant: DEISVariant = "tab",
    lower_order_final: bool = True,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples with DEIS (Zhang & Chen 2022): epsilon is extrapolated by a polynomial through the last `order` rows.

    With y = x / alpha, r = sigma / alpha, and L_j the polynomials that are 1 at one of these rows and 0 at the others:

        y' = y + e int L_0 dr + h1 int L_1 dr + h2 int L_2 dr,  from r to r'

    They are polynomials in log r ("log_rho", diffusers' DEISMultistepScheduler) or in t ("tab", tAB-DEIS, which is the
    better one in few steps). Order 1 is DDIM. For a flow "tab" has y = x, r = sigma and the velocity in place of e.

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            It is given t float32 where times are fractional (as by default) and for prediction "flow".
            Here times are rounded, so that t is int64 but for a flow.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            None for a flow.
        timesteps: "auto", see `ddim`; "linspace" round(i (T - 1) / N), i = N .. 1; "leading" i (T // (N + 1)), for
            Stable Diffusion instead fastsample.solver_timesteps(1000, "leading", steps, steps_offset=1); "trailing";
            other spacings and the timesteps themselves as in fastsample.spaced_timesteps; "karras" and "log_snr": noise
            levels from that of T - 1 to that of 0 with (sigma / alpha)^(1/7) or log SNR evenly spaced, t rounded;
            "ays_sd15" or "ays_sdxl": Align Your Steps. For a flow "linspace", which "auto" is there, "trailing" or
            times, see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching; default
            `model.prediction`, found as the schedule is, else "epsilon".
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            A DynamicThreshold is diffusers' thresholding.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
        order: 1, 2 or 3. The first rows are of lower order.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        variant: "log_rho" or "tab", what the polynomials are of. Between whole timesteps log r is linear in t.
        lower_order_final: below 15 steps, take the last two rows with orders 1 and 2.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.DEIS, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `DEIS.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for an order other than 1, 2 or 3, an unknown variant, a clip that is not positive, a prediction
            that cannot work at one of the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> deis(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=6, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> DEIS(Schedule.linear(), steps=5, order=3, variant="tab").table.reads
        (0, 1, 2, 1, 0)
    """

def dpm_solver(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 20,
    schedule: Schedule | None = None,
    timesteps: Times = "auto",
    prediction: Prediction | None = None,
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    order: int = 2,
    correct_x0: CorrectX0 | None = None,
    lower_order_final: bool = True,
    sde: bool = False,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples from a diffusion model with multistep DPM-Solver++ (Lu et al. 2022): good samples in 10 to 25 calls.

    The diffusion ODE is solved exactly but for x0, which is taken as a polynomial in lambda = log(alpha / sigma)
    through that of this row and of the `order` - 1 rows before it. From noise level (alpha, sigma) to (alpha', sigma'),
    with w = lambda' - lambda the width of this row, w1 and w2 those of the last two, and n = 1:

        order 1: x' = sigma'/sigma e^-(n-1)w x + alpha' E x0,  E = 1 - e^-nw
        order 2: ... + alpha' E w/2 D1
        order 3: ... + alpha' ((nw - E)/n (D1 + w1 D2) + (w^2/2 - (nw - E)/n^2) D2)

    where D1 = (x0 - h1)/w1 and D2 = (D1 - (h1 - h2)/w2)/(w1 + w2) are divided differences of x0 over lambda, h1 and h2
    the x0 of the last two rows. With `sde` the diffusion's reverse SDE is solved: n = 2, and sigma' sqrt(1 - e^-2w) z
    is added. These are diffusers' DPMSolverMultistepScheduler with "dpmsolver++" or "sde-dpmsolver++" and "midpoint",
    and order 1 is DDIM. (In order 3 of the SDE diffusers 0.42 has another sign before w^2/2, with which its order is 1;
    here it is k-diffusion's.)

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            It is given t float32 where times are fractional (as by default) and for prediction "flow".
            Here times are rounded, so that t is int64 but for a flow.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            None for a flow.
        timesteps: "auto", see `ddim`; "linspace" round(i (T - 1) / N), i = N .. 1; "leading" i (T // (N + 1)), for
            Stable Diffusion instead fastsample.solver_timesteps(1000, "leading", steps, steps_offset=1); "trailing";
            other spacings and the timesteps themselves as in fastsample.spaced_timesteps; "karras" and "log_snr": noise
            levels from that of T - 1 to that of 0 with (sigma / alpha)^(1/7) or log SNR evenly spaced, t rounded;
            "ays_sd15" or "ays_sdxl": Align Your Steps. For a flow "linspace", which "auto" is there, "trailing" or
            times, see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching; default
            `model.prediction`, found as the schedule is, else "epsilon".
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            A DynamicThreshold is diffusers' thresholding.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
            At 1 the last row is of order 1.
        order: 1, 2 or 3; 2 is best under guidance, 3 without. The first rows are of lower order.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        lower_order_final: below 15 steps, take the last two rows with orders 2 and 1.
        sde: whether to add noise in every row that does not end in clean data: more steps, more variety.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.DPMSolver, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `DPMSolver.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for an order other than 1, 2 or 3, a clip that is not positive, a prediction that cannot work at one
            of the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> dpm_solver(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = DPMSolver(Schedule.linear(), steps=20, sde=True)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

def euler(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Times = "auto",
    prediction: Prediction | None = None,
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    correct_x0: CorrectX0 | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples with Euler's method on the diffusion ODE dy/dr = (y - x0)/r, y = x / alpha, r = sigma / alpha.

        x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0

    This is DDIM with eta = 0, at the noise levels of diffusers' EulerDiscreteScheduler (and k-diffusion), whose state
    is y; ours is x, what the model is given (they draw y_T with the deviation r_T, we x_T with 1). For a flow it is
    x' = x + (sigma' - sigma) m, as diffusers' FlowMatchEulerDiscreteScheduler.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            It is given t float32 where times are fractional (as by default) and for prediction "flow".
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            None for a flow.
        timesteps: "auto", see `ddim`; "linspace" i (T - 1) / (N - 1), not rounded: sigma / alpha is interpolated
            between whole timesteps; "karras" or "log_snr": N levels from that of T - 1 to that of 0 with
            (sigma / alpha)^(1/7) or log SNR evenly spaced, t interpolated; "ays_sd15" or "ays_sdxl": Align Your Steps;
            the times themselves, whole or fractional, such as those of fastsample.optimal_timesteps;
            "leading", "trailing" and the others of fastsample.spaced_timesteps. For a flow "linspace", which "auto" is
            there, "trailing" or times (1000 sigma), see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching; default
            `model.prediction`, found as the schedule is, else "epsilon".
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.Euler, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `Euler.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.

    Example:
        >>> from fastsample import Schedule
        >>> euler(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> euler(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=4, prediction="flow", shift=3.0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = Euler(Schedule.linear(), steps=30, timesteps="karras")
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> Euler(prediction="flow", steps=4, shift=3.0).table.t.round().tolist()
        [1000.0, 858.0, 602.0, 9.0]
    """

def euler_ancestral(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Times = "auto",
    prediction: Prediction | None = None,
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    correct_x0: CorrectX0 | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples with Euler's method down to less noise than the next level has, and makes up the difference afresh.

    With r = sigma / alpha and y = x / alpha:

        up^2 = r'^2 (1 - r'^2 / r^2),  down^2 = r'^2 - up^2
        y' = y + (down - r) (y - x0)/r + up z

    This is DDIM with eta = 1, as diffusers' EulerAncestralDiscreteScheduler (and k-diffusion's sample_euler_ancestral).

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            It is given t float32 where times are fractional (as by default) and for prediction "flow".
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            None for a flow.
        timesteps: "auto", see `ddim`; "linspace" i (T - 1) / (N - 1), not rounded: sigma / alpha is interpolated
            between whole timesteps; "karras" or "log_snr": N levels from that of T - 1 to that of 0 with
            (sigma / alpha)^(1/7) or log SNR evenly spaced, t interpolated; "ays_sd15" or "ays_sdxl": Align Your Steps;
            the times themselves, whole or fractional, such as those of fastsample.optimal_timesteps;
            "leading", "trailing" and the others of fastsample.spaced_timesteps. For a flow "linspace", which "auto" is
            there, "trailing" or times (1000 sigma), see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching; default
            `model.prediction`, found as the schedule is, else "epsilon".
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.EulerAncestral, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `EulerAncestral.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.

    Example:
        >>> from fastsample import Schedule
        >>> euler_ancestral(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = EulerAncestral(Schedule.linear(), steps=30)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

def euler_invert(
    model: Model,
    x0: Tensor,
    *,
    steps: int = 50,
    schedule: Schedule | None = None,
    timesteps: Times = "auto",
    prediction: Prediction | None = None,
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    convention: Convention = "mirror",
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Encodes clean samples as noise: the ODE of `euler` run backwards, that of a flow above all.

    `euler` with the same arguments, from the result, is the decoder; the error of the round trip is of the order of a
    step. From noise level (alpha, sigma) to the noisier one (alpha', sigma'):

        x' = alpha' x0 + sigma' epsilon

    with the x0 and epsilon that the model's output tells. For a flow that is x' = x + (sigma' - sigma) m.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            It is given t float32 where times are fractional (as by default) and for prediction "flow".
        x0: the clean samples, a tensor of float16, bfloat16, float32, or float64 for the reference backend. Never
            modified.
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            None for a flow.
        timesteps: "auto", see `ddim`; "linspace" i (T - 1) / (N - 1), not rounded: sigma / alpha is interpolated
            between whole timesteps; "karras" or "log_snr": N levels from that of T - 1 to that of 0 with
            (sigma / alpha)^(1/7) or log SNR evenly spaced, t interpolated; "ays_sd15" or "ays_sdxl": Align Your Steps;
            the times themselves, whole or fractional, such as those of fastsample.optimal_timesteps;
            "leading", "trailing" and the others of fastsample.spaced_timesteps. For a flow "linspace", which "auto" is
            there, "trailing" or times (1000 sigma), see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching; default
            `model.prediction`, found as the schedule is, else "epsilon".
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            "mirror" keeps the model's epsilon then, "improved" takes it from the new x0, as the code that they
            follow.
            But a flow keeps the model's own epsilon.
        final_alpha_cumprod: that of the decoder; unused by "improved".
        convention: at which of the two levels the model is called.
            - "mirror": at the noisier one, which is reached: where `euler` starts from, the levels it passes;
            - "improved": at the one that x is at. A flow then begins at t = 0 and makes its last call before t = 1000;
              otherwise as for `ddim_invert`.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.
            `strength`, `mask` and `known` are for sampling only.

    Calls with the same arguments share a fastsample.EulerInverse, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `EulerInverse.prepare` for short runs.

    Returns:
        The noise, float32 (float64 for a float64 x0), without gradients unless x0 requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for an unknown convention, and for a prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import euler
        >>> x0 = torch.ones(1, 3, 8, 8)
        >>> noise = euler_invert(lambda x, t: 0.1 * x, x0, steps=100, prediction="flow")
        >>> round(float(euler(lambda x, t: 0.1 * x, noise, steps=100, prediction="flow").mean()), 2)
        1.0
        >>> inverse = EulerInverse(prediction="flow", steps=4, timesteps="trailing", shift=3.0)
        >>> inverse.table.t.tolist()
        [500.0, 750.0, 900.0, 1000.0]
    """

def heun(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 25,
    schedule: Schedule | None = None,
    timesteps: Times = "auto",
    prediction: Prediction | None = None,
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    correct_x0: CorrectX0 | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples with Heun's method (Karras et al. 2022), of second order, at 2 `steps` - 1 model calls.

    From noise level (alpha, sigma) to (alpha', sigma'), two rows for all steps but the last:

        predictor: x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0
        corrector: x'' = x' + g (x0' - h1),  g = (alpha'^2 sigma / (alpha sigma') - alpha') / 2

    where h1 is the predictor's x0 and x0' that of the model at x'. It averages the slopes (y - x0)/r of y = x / alpha
    over r = sigma / alpha. A flow averages (x - x0)/sigma, its own velocity, so that g = (sigma / sigma' - 1) / 2.

    As diffusers' HeunDiscreteScheduler (and, without churn, k-diffusion's sample_heun), but that the state is x, what
    the model is given; for a flow as FlowMatchHeunDiscreteScheduler. Where a schedule begins next to pure noise
    (Schedule.cosine) "linspace" has too long a first step for it: take timesteps="karras" or the default. "auto" starts
    v and x0 models where it starts epsilon models: the corrector multiplies errors in x0 too.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            It is given t float32 where times are fractional (as by default) and for prediction "flow".
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: times visited; row, `noise`, `start_step` and fastsample.Step count model calls, 2 a step.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            None for a flow.
        timesteps: "auto", see `ddim`; "linspace" i (T - 1) / (N - 1), not rounded: sigma / alpha is interpolated
            between whole timesteps; "karras" or "log_snr": N levels from that of T - 1 to that of 0 with
            (sigma / alpha)^(1/7) or log SNR evenly spaced, t interpolated; "ays_sd15" or "ays_sdxl": Align Your Steps;
            the times themselves, whole or fractional, such as those of fastsample.optimal_timesteps;
            "leading", "trailing" and the others of fastsample.spaced_timesteps. For a flow "linspace", which "auto" is
            there, "trailing" or times (1000 sigma), see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching; default
            `model.prediction`, found as the schedule is, else "epsilon".
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.Heun, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `Heun.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: where alpha bar is 0 (unless of a flow) or 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> heun(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = Heun(Schedule.linear(), steps=10, timesteps="karras")
        >>> len(sampler.table)
        19
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
    """

def ipndm(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 10,
    schedule: Schedule | None = None,
    timesteps: Times = "auto",
    prediction: Prediction | None = None,
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    order: int = 4,
    correct_x0: CorrectX0 | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples with iPNDM (Zhang & Chen 2022): Adams-Bashforth on epsilon, the best solver in 4 to 10 calls.

    With y = x / alpha, r = sigma / alpha and e, h1, h2, h3 the epsilon of this row and of the three before it:

        order 1: y' = y + (r' - r) e
        order 2: y' = y + (r' - r) (3 e - h1) / 2
        order 3: y' = y + (r' - r) (23 e - 16 h1 + 5 h2) / 12
        order 4: y' = y + (r' - r) (55 e - 59 h1 + 37 h2 - 9 h3) / 24

    The coefficients are those of steps of one size, as in the papers' code (zju-pi/diff-sampler), whatever the steps
    are; the first rows are of lower order. Order 1 is DDIM. For a flow y is x, r is sigma and e is the velocity z - x0.
    (diffusers' IPNDMScheduler knows neither a schedule nor what the model predicts.)

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            It is given t float32 where times are fractional (as by default) and for prediction "flow".
            Here times are rounded, so that t is int64 but for a flow.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            None for a flow.
        timesteps: "auto", see `ddim`; "linspace" round(i (T - 1) / N), i = N .. 1; "leading" i (T // (N + 1)), for
            Stable Diffusion instead fastsample.solver_timesteps(1000, "leading", steps, steps_offset=1); "trailing";
            other spacings and the timesteps themselves as in fastsample.spaced_timesteps; "karras" and "log_snr": noise
            levels from that of T - 1 to that of 0 with (sigma / alpha)^(1/7) or log SNR evenly spaced, t rounded;
            "ays_sd15" or "ays_sdxl": Align Your Steps. For a flow "linspace", which "auto" is there, "trailing" or
            times, see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching; default
            `model.prediction`, found as the schedule is, else "epsilon".
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            A DynamicThreshold is diffusers' thresholding.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
        order: 1 to 4.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.IPNDM, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `IPNDM.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for an order other than 1 to 4, a clip that is not positive, a prediction that cannot work at one of
            the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> ipndm(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=6, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> IPNDM(Schedule.linear(), steps=5).table.reads
        (0, 1, 2, 3, 3)
    """

def lcm(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 4,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "lcm",
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    prediction: Prediction | None = None,
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    guidance_embedding: float | Sequence[float] | Tensor | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples from a latent consistency model (Luo et al. 2023), as diffusers' LCMScheduler does.

    From timestep t to the next entry of the list, with its alpha bar a' (1 after the last) and r = timestep_scaling t:

        c_skip = sigma_data^2 / (r^2 + sigma_data^2)
        c_out  = r / sqrt(r^2 + sigma_data^2)
        x'     = sqrt(a') (c_skip x + c_out x0) + sqrt(1 - a') z

    so the last row adds no noise.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            Distilled to jump to x0 from any of its timesteps; or any model under an LCM-LoRA.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` names a spacing; otherwise ignored. A single step is from timestep T - 1
            under every name but "auto" (spaced_timesteps gives the peers' lists).
            At most `original_steps` for "lcm".
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            Stable Diffusion's is Schedule.scaled_linear().
        timesteps: which timesteps to visit. "auto" is round((1 - k / N) (t0 + 1)) - 1, k = 0 .. N - 1. t0 is T - 1 for
            v and x0 models, and where sigma / alpha is at most 16 there, as for Stable Diffusion; else the noisiest
            timestep whose first step makes at most 6 times as much of an error in epsilon. fastsample.spaced_timesteps
            has the spacings of other libraries by name; "ays_sd15" or "ays_sdxl": Align Your Steps; or the timesteps
            themselves, such as those of fastsample.optimal_timesteps.
            The default takes some of the timesteps of the distillation.
        original_steps: how many timesteps the model was distilled at.
        timestep_scaling: of the boundary scalings, as in the distillation.
        sigma_data: of the boundary scalings, as in the distillation.
        prediction: what the model predicts: "epsilon", "v" (sqrt(a) epsilon - sqrt(1 - a) x0) or "x0"; default
            `model.prediction`, found as the schedule is, else "epsilon".
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        guidance_embedding: the guidance scale w that a model with `config.time_cond_proj_dim` is told, a number or
            one per sample: it is given guidance_scale_embedding(w, time_cond_proj_dim) as the keyword
            `timestep_cond`. Such a model needs no second, unconditional call.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.
            With `strength` and timesteps "lcm" all `steps` are made, from timestep
            k floor(original_steps strength) - 1 on, k = T // original_steps.

    Calls with the same arguments share a fastsample.LCM, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `LCM.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for a scale that is not positive, and for a prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import Schedule
        >>> lcm(lambda x, t: 0.1 * x, (2, 4, 8, 8), steps=4, schedule=Schedule.scaled_linear(), seed=0).shape
        torch.Size([2, 4, 8, 8])
        >>> sampler = LCM(Schedule.scaled_linear(), steps=4)
        >>> sampler.table.t.tolist()
        [999, 759, 499, 259]
        >>> sampler(lambda x, t: 0.1 * x, (2, 4, 8, 8), seed=1).shape
        torch.Size([2, 4, 8, 8])
    """

def tcd(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 4,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "lcm",
    original_steps: int = 50,
    gamma: float = 0.3,
    prediction: Prediction | None = None,
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples by trajectory consistency distillation (Zheng et al. 2024), as diffusers' TCDScheduler does.

    From timestep t to the next entry of the list, t' (0 after the last), by way of t_s = floor((1 - gamma) t'), with
    alpha bars a' and a_s there:

        x_s = sqrt(a_s) x0 + sqrt(1 - a_s) epsilon
        x'  = sqrt(a' / a_s) x_s + sqrt(1 - a' / a_s) z

    so the last row adds no noise, and the result lies at timestep 0.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            Distilled by TCD or under its LoRA.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` names a spacing; otherwise ignored. A single step is from timestep T - 1
            under every name but "auto" (spaced_timesteps gives the peers' lists).
            At most `original_steps` for "lcm".
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            Stable Diffusion's is Schedule.scaled_linear().
        timesteps: which timesteps to visit. "auto" is round((1 - k / N) (t0 + 1)) - 1, k = 0 .. N - 1. t0 is T - 1 for
            v and x0 models, and where sigma / alpha is at most 16 there, as for Stable Diffusion; else the noisiest
            timestep whose first step makes at most 6 times as much of an error in epsilon. fastsample.spaced_timesteps
            has the spacings of other libraries by name; "ays_sd15" or "ays_sdxl": Align Your Steps; or the timesteps
            themselves, such as those of fastsample.optimal_timesteps.
            The default takes some of the timesteps of the distillation.
        original_steps: how many timesteps the model was distilled at.
        gamma: in [0, 1]: 0 is deterministic, 1 all fresh noise. diffusers calls it eta.
        prediction: what the model predicts: "epsilon", "v" (sqrt(a) epsilon - sqrt(1 - a) x0) or "x0"; default
            `model.prediction`, found as the schedule is, else "epsilon".
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            Epsilon is taken from the new x0. TCDScheduler never clips.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.
            `strength` leaves steps out, as diffusers' image-to-image pipelines do with TCDScheduler.

    Calls with the same arguments share a fastsample.TCD, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `TCD.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for a gamma outside [0, 1], and for a prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import Schedule
        >>> tcd(lambda x, t: 0.1 * x, (2, 4, 8, 8), steps=4, schedule=Schedule.scaled_linear(), seed=0).shape
        torch.Size([2, 4, 8, 8])
        >>> sampler = TCD(Schedule.scaled_linear(), steps=4, gamma=0.3)
        >>> sampler(lambda x, t: 0.1 * x, (2, 4, 8, 8), seed=1).shape
        torch.Size([2, 4, 8, 8])
    """

def unipc(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 10,
    schedule: Schedule | None = None,
    timesteps: Times = "auto",
    prediction: Prediction | None = None,
    shift: float = 1.0,
    clip: Clip = None,
    final_alpha_cumprod: float = 1.0,
    order: int = 2,
    correct_x0: CorrectX0 | None = None,
    variant: UniPCVariant = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    decode: Decode[Decoded] | None = None,
    **options: Unpack[Undecoded],
) -> Decoded:
    """Samples with UniPC (Zhao et al. 2023), of order 1 to 3, one more with its corrector: the best from 6 calls on.

    From noise level (alpha, sigma) to (alpha', sigma'), with w the width of the row in lambda = log(alpha / sigma),
    m_j the x0 of j rows ago, r_j = (lambda_j - lambda) / w, D_j = (m_j - m_0) / r_j, and B = -w ("bh1") or e^-w - 1
    ("bh2"):

        predictor: x' = sigma'/sigma x - alpha' (e^-w - 1) m_0 - alpha' B sum_j p_j D_j,  j = 1 .. order - 1
        corrector: x  = the same, with c_j in place of p_j, and - alpha' B c_order (x0 - m_0) beside it

    where x0 is the model's at x', and p and c solve a small system for each row. The corrector costs no model call and
    no memory: x and the corrected x differ by a combination of x0 and of the m_j, which is added where the next row is
    taken. These are diffusers' UniPCMultistepScheduler with predict_x0.

    A run that starts part-way (`strength`, `start_step`) has no history there, so its order rises from 1 again.

    Args:
        model: called as model(x, t, **model_kwargs), t int64 of shape (B,); returns a tensor, a tuple that starts with
            one, or an object with `.sample`. Where axis 1 of the output is twice that of x, the second half (a learned
            variance) is ignored. Its x and t are the loop's own buffers: not to be modified, which raises ValueError,
            and overwritten afterwards. It is used as it is: call .eval() first. A module in training mode, where
            dropout and batch norm disturb samples, is warned of once.
            It is given t float32 where times are fractional (as by default) and for prediction "flow".
            Here times are rounded, so that t is int64 but for a flow.
        x: the shape (B, ...) of the result, with x_T drawn from `seed`; or x_T itself, float16, bfloat16, float32, or
            float64 for the reference backend. Never modified. Drawn noise that is far from the level of the first
            timestep (sigma below 5 alpha, where the schedule has noisier ones) is warned of.
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: the one the model was trained with; default `model.schedule`, also that of the one model which a
            wrapper, function or lambda calls, else Schedule.linear(1000): with a warning where a model is found.
            None for a flow.
        timesteps: "auto", see `ddim`; "linspace" round(i (T - 1) / N), i = N .. 1; "leading" i (T // (N + 1)), for
            Stable Diffusion instead fastsample.solver_timesteps(1000, "leading", steps, steps_offset=1); "trailing";
            other spacings and the timesteps themselves as in fastsample.spaced_timesteps; "karras" and "log_snr": noise
            levels from that of T - 1 to that of 0 with (sigma / alpha)^(1/7) or log SNR evenly spaced, t rounded;
            "ays_sd15" or "ays_sdxl": Align Your Steps. For a flow "linspace", which "auto" is there, "trailing" or
            times, see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching; default
            `model.prediction`, found as the schedule is, else "epsilon".
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        clip: clamp x0 to [-clip, clip]; or to (low, high), numbers or arrays that broadcast to a sample, such as one
            for each of a robot's actions; a fastsample.DynamicThreshold; None for none of them.
            A DynamicThreshold is diffusers' thresholding.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
            At 1 the last row is of order 1.
        order: 1, 2 or 3; 2 is best under guidance, 3 without. The first rows are of lower order.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping; costs a second pass over memory.
        variant: "bh1", better in up to 10 calls, or "bh2".
        corrector: whether to correct.
        lower_order_final: take the last two rows with orders 2 and 1.
        decode: what to make of the sample before it is returned, see fastsample.Options.
        **options: the arguments of every sampler, documented in fastsample.Options: seed, index, noise,
            model_dtype, model_kwargs, cast_kwargs, guidance, cond, uncond, guidance_rescale, guidance_interval, mask,
            known, strength, start_step, callback, progress, out, backend, device.

    Calls with the same arguments share a fastsample.UniPC, whose table takes some 0.3 ms to make.
    Make a schedule once, not in every call: two are told apart by identity.
    See `UniPC.prepare` for short runs.

    Returns:
        The sample, float32 (float64 for a float64 x), without gradients unless x requires them: then the
        differentiable reference runs.

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.
        ValueError: for an order other than 1, 2 or 3, an unknown variant, a clip that is not positive, a prediction
            that cannot work at one of the levels, and where alpha bar is 1 at a timestep that is visited.

    Example:
        >>> from fastsample import Schedule
        >>> unipc(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=8, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> UniPC(Schedule.linear(), steps=6, order=3).table.reads
        (0, 1, 2, 3, 3, 0)
    """
