"""The words of diffusers, k-diffusion, improved-diffusion and others, and what is written here in their place.

fastsample.hints makes messages of them. A line serves every function: what a function lacks is not suggested.
"""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """What other libraries call something else.

    Attributes:
        here: what it may be here, the likeliest first: `steps=`, or with a value `sde=True`.
        note: what to know besides; all there is where nothing here is like it.
        of: the argument that the note is about, without which it says nothing; "" for any.
    """

    here: tuple[str, ...]
    note: str = ""
    of: str = ""


_EMBEDDED = "a model's own keywords, such as embeddings of prompts, go into cond=, uncond= or model_kwargs="
OF_SAMPLERS = ("steps", "schedule", "timesteps", "prediction", "clip", "eta")  # what a sampler is made with
OF_RUNS = (  # some of what its call takes
    *("seed", "index", "noise", "model_dtype", "model_kwargs", "cast_kwargs", "cond", "uncond", "mask", "known"),
    *("strength", "start_step", "callback", "progress", "decode", "out", "backend", "device"),
)
FROM_DIFFUSERS = "fastsample.from_diffusers(scheduler, steps=...) makes a sampler of diffusers' scheduler"
_SCHEDULES = "fastsample.Schedule makes one: linear, scaled_linear, cosine, from_betas, from_alphas_cumprod"
_SHAPE = "x is the state to start from, and for samplers also the shape (B, ...) of the result"
_RANGE = "the number is the range"
_STEPS = "sampler.iterate(...) shows every step, and may be left at any of them"

# What it is here; what else to say; the words.
_ARGUMENTS = (
    (
        ("steps=",),
        "",
        "num_inference_steps num_sampling_steps num_steps n_steps inference_steps sampling_steps sampling_timesteps "
        "sample_steps denoising_steps ddim_steps ode_steps num_denoising_steps nfe n_timesteps",
    ),
    (("original_steps=",), "", "original_inference_steps lcm_origin_steps num_ddim_timesteps"),
    (
        ("guidance=", "weight="),
        "",
        "guidance_scale cfg cfg_scale true_cfg_scale cond_scale guidance_weight guidance_strength cfg_weight "
        "unconditional_guidance_scale uncond_scale classifier_free_guidance text_guidance_scale cfg_strength",
    ),
    (
        ("guidance=",),
        "a number, one per sample, or a fastsample.Guidance",
        "skip_layer_guidance_scale skip_layer_guidance_start skip_layer_guidance_stop skip_guidance_layers "
        "guidance_layers pag_scale pag_adaptive_scale stg_scale cfg_normalization use_dynamic_cfg guidance_scale_2 "
        "guider image_guidance_scale prior_guidance_scale",
    ),
    (
        ("guidance_rescale=", "rescale="),
        "",
        "cfg_rescale rescale_cfg cfg_rescale_phi guidance_rescale_factor rescale_phi",
    ),
    (
        ("guidance_interval=", "interval="),
        "",
        "cfg_interval guidance_range cfg_range guidance_start guidance_end guidance_low guidance_high cfg_truncation "
        "guidance_start_step guidance_end_step guidance_scale_interval cfg_start cfg_end",
    ),
    (("guidance_embedding=",), "", "embedded_guidance_scale distilled_guidance_scale guidance_scale_embedding"),
    (("seed=", "noise="), "", "generator generators rng torch_generator prng_key"),
    (("seed=",), "", "seeds noise_sampler_seed random_seed manual_seed noise_seed random_state"),
    (("index=",), "", "sample_index sample_offset first_sample"),
    (("noise=",), "", "noise_sampler variance_noise step_noise noise_fn noises noise_generator"),
    (
        ("x=", "x0="),
        _SHAPE,
        "latents latent latent_image init_latents initial_noise initial_noise_latents start_noise x_t xt x_init "
        "x_start shape batch_size height width size image_size num_samples n_samples num_frames image video img "
        "init_image num_images_per_prompt num_videos_per_prompt original_samples",
    ),
    (("strength=",), "", "denoising_strength denoise prompt_strength img2img_strength"),
    (
        ("start_step=",),
        "",
        "denoising_start start_at_step begin_index i_start t_enc skip_timesteps start_index t_start",
    ),
    ((), _STEPS, "denoising_end end_at_step last_step t_end end_step stop_at"),
    (
        ("callback=",),
        "it is called with a fastsample.Step after every row",
        "callback_on_step_end callback_on_step_end_tensor_inputs callback_steps callback_fn step_callback img_callback "
        "on_step_end callbacks callback_interval hook hooks",
    ),
    (("progress=True",), "without it no bar is shown", "progress_bar disable disable_tqdm verbose show_progress tqdm"),
    (("decode=",), "", "output_type vae decoder decode_fn vae_decode decode_chunk_size decode_timestep postprocess"),
    (("out=",), "", "output out_tensor"),
    ((), f"the sample itself is returned; {_STEPS}", "return_dict return_info return_intermediates log_every_t"),
    ((), f"the sample itself is returned; {_STEPS}", "return_all_timesteps return_trajectory return_traj save_every"),
    (("device=",), "", "torch_device accelerator"),
    (("model_dtype=",), "", "dtype torch_dtype weight_dtype precision"),
    ((), "gradients go through the run where x requires them", "requires_grad no_grad enable_grad grad"),
    ((), "models are used as they are: wrap yours beforehand", "compile half fp16 use_fp16 autocast pin_memory layout"),
    (("backend=",), "fastsample.backends() lists them", "use_triton use_cuda implementation kernel"),
    (("model_kwargs=",), "", "extra_args model_args extra_kwargs model_inputs extra_model_kwargs kwargs"),
    (("cond=",), "", "conditioning conditional cond_kwargs positive cond_inputs condition conditions"),
    (
        ("uncond=",),
        "",
        "unconditional_conditioning unconditional uncond_kwargs negative uc uncond_inputs unconditional_condition "
        "uncond_embeddings neg_kwargs",
    ),
    (
        ("model_kwargs={{{0!r}: ...}}", "cond="),
        "",
        "y encoder_hidden_states encoder_attention_mask class_labels labels added_cond_kwargs timestep_cond context "
        "cross_attention_kwargs attention_kwargs joint_attention_kwargs pooled_projections attention_mask txt_ids "
        "img_ids global_cond local_cond image_embeds image_embeddings controlnet_cond obs "
        "down_block_additional_residuals mid_block_additional_residual",
    ),
    (
        (),
        _EMBEDDED,
        "prompt prompts prompt_2 prompt_3 prompt_embeds pooled_prompt_embeds prompt_attention_mask negative_prompt "
        "negative_prompt_2 negative_prompt_3 negative_prompt_embeds negative_pooled_prompt_embeds prompt_embeds_mask "
        "negative_prompt_attention_mask negative_prompt_embeds_mask ip_adapter_image ip_adapter_image_embeds "
        "class_cond negative_embeds text_embeddings clip_skip max_sequence_length embeds negative_image_embeds "
        "prompt_embeds_2 negative_prompt_embeds_2 prompt_template system_prompt negative_ip_adapter_image "
        "negative_ip_adapter_image_embeds negative_attention_mask clean_caption crops_coords_top_left original_size "
        "target_size negative_crops_coords_top_left negative_original_size negative_target_size aesthetic_score "
        "negative_aesthetic_score control_image control_mode controlnet_conditioning_scale control_guidance_start "
        "control_guidance_end guess_mode fps frame_rate noise_level padding_mask_crop use_resolution_binning",
    ),
    (("mask=",), "1 is what to fill in", "mask_image inpaint_mask inpainting_mask latent_mask masks"),
    (
        ("known=",),
        "",
        "x0 masked_image masked_image_latents original_image image_latents x0_known ground_truth known_x0",
    ),
    (
        ("correct_x0=",),
        "",
        "denoised_fn score_corrector corrector_fn quantize_denoised quantize_x0 postprocess_x0 x0_fn correcting_x0_fn",
    ),
    ((), "gradients of a classifier go into the model that you give", "cond_fn classifier_fn classifier_guidance"),
    (
        ("clip=1.0",),
        _RANGE,
        "clip_sample clip_denoised clip_sample_range clamp clip_x0 clamp_x0 clip_value clip_range clip_x_start",
    ),
    (
        ("clip=fastsample.DynamicThreshold()",),
        "",
        "thresholding dynamic_thresholding dynamic_thresholding_ratio sample_max_value dynamic_threshold threshold",
    ),
    (("rederive_epsilon=",), "", "use_clipped_model_output use_clipped_output rederive_pred_noise"),
    (
        ("prediction=",),
        "",
        "prediction_type model_type parameterization parametrization objective pred_type predict_xstart "
        "model_mean_type predict_epsilon v_prediction is_v_prediction model_output_type use_flow_sigmas flow",
    ),
    (
        (),
        "a sampler calls its model itself",
        "noise_pred model_output model_out eps_pred v_pred timestep per_token_timesteps sample prev_timestep "
        "prev_sample pred_original_sample",
    ),
    (
        ("timesteps=",),
        "",
        "timestep_spacing timestep_respacing skip_type spacing time_spacing timesteps_spacing use_timesteps "
        "timestep_schedule discretize ddim_discretize ddim_discr_method discretization timestep_type "
        "interpolation_type t_steps",
    ),
    (("timesteps=",), "for a flow they are 1000 sigma", "sigmas sigma_schedule timestep_sigmas"),
    (
        (),
        "solvers, such as fastsample.euler, have timesteps='karras'",
        "use_karras_sigmas use_karras karras karras_rho",
    ),
    (
        (),
        "solvers, such as fastsample.euler, have timesteps='log_snr'",
        "use_exponential_sigmas use_lu_lambdas use_exponential log_snr",
    ),
    (
        ("timesteps=",),
        "a spacing of your own is a list of timesteps",
        "use_beta_sigmas rho sigma_min sigma_max lambda_min_clipped t_min t_max rho_schedule",
    ),
    (("timesteps=",), "fastsample.spaced_timesteps has steps_offset=", "steps_offset step_offset ddim_offset"),
    (
        ("shift=",),
        "",
        "flow_shift timestep_shift time_shift snr_shift_scale shift_terminal invert_sigmas sigma_shift schedule_shift",
    ),
    (("shift=math.exp(mu)",), "", "mu"),
    (
        ("shift=",),
        "with mu as the pipeline works it out, shift=math.exp(mu)",
        "use_dynamic_shifting base_shift max_shift time_shift_type base_image_seq_len max_image_seq_len",
    ),
    (
        (),
        f"{FROM_DIFFUSERS}; a schedule is a fastsample.Schedule",
        "scheduler noise_scheduler diffusion_scheduler sigma_fn",
    ),
    (
        ("T=", "schedule="),
        _SCHEDULES,
        "num_train_timesteps diffusion_steps train_timesteps train_steps num_timesteps num_diffusion_timesteps n_train",
    ),
    (
        ("betas=", "schedule="),
        _SCHEDULES,
        "trained_betas betas beta_start beta_end beta_schedule noise_schedule beta_min beta_max noise_schedule_type",
    ),
    (("alphas_cumprod=", "schedule="), _SCHEDULES, "alphas_cumprod alpha_bar alpha_bars alphas_bar abar alphas"),
    (("schedule=",), "Schedule.rescale_zero_terminal_snr()", "rescale_betas_zero_snr zero_terminal_snr zsnr"),
    (("final_alpha_cumprod=",), "schedule.alphas_cumprod[0], or 1", "set_alpha_to_one final_sigmas_type alpha_prev"),
    (("variance=",), "", "variance_type model_var_type learn_sigma sigma_small var_type posterior_variance"),
    (("order=",), "", "solver_order predictor_order corrector_order multistep_order"),
    (("variant=",), "", "solver_type solver_p"),
    (("sde=True",), "", "algorithm_type"),
    (("corrector=False",), "", "disable_corrector use_corrector no_corrector"),
    (("lower_order_final=",), "", "euler_at_final denoise_to_zero lower_order_at_end"),
    (("eta=", "gamma=", "sde=True"), "", "eta ddim_eta ddim_sampling_eta eta_ddim stochastic_sampling stochasticity"),
    (
        ("eta=", "gamma=", "sde=True"),
        "fastsample.euler_ancestral adds noise too",
        "s_churn s_tmin s_tmax s_noise churn noise_scale temperature noise_dropout",
    ),
    (
        (),
        "each method is a function of its own, such as fastsample.dpm_solver",
        "sampler sampler_name method solver use_ddim",
    ),
    (
        ("steps=",),
        "there are no adaptive steps",
        "atol rtol h_init pcoeff icoeff dcoeff accept_safety",
    ),
    ((), "a model is given the timesteps of its schedule: wrap one that wants others", "rescale_timesteps scale_t"),
    ((), "models of x0 and of epsilon are told apart by prediction=", "predict_x0"),
)

# Of each argument that is one of a few names: the name here, the words.
VALUES: dict[str, dict[str, str]] = {
    "prediction": {
        "epsilon": "eps noise e pred_noise noise_pred noise_prediction epsilon_prediction epsilons eps_prediction",
        "v": "v_prediction v_pred pred_v vpred velocity v_param v_parameterization velocity_prediction",
        "x0": "sample x_0 start_x x_start xstart pred_x0 pred_xstart x0_pred x0_prediction data denoised clean "
        "original_sample sample_prediction data_prediction predicted_x0 pred_x_start",
        "flow": "flow_prediction flow_matching flow_match rectified_flow rf vector_field flow_pred u velocity cfm",
    },
    "variance": {
        "fixed_small": "fixed_small_log small posterior beta_tilde sigma_small fixedsmall fixed",
        "fixed_large": "fixed_large_log large beta sigma_large fixedlarge",
        "learned_range": "learn_sigma learned_sigma range learned_interpolation learned_interpolated",
        "learned": "learn learned_log_variance",
    },
    "timesteps": {
        "linspace": "linear uniform even evenly normal time_uniform",
        "leading": "ddim ddim_uniform uniform time_uniform",
        "trailing": "sgm_uniform simple",
        "quad": "quadratic time_quadratic",
        "karras": "use_karras_sigmas",
        "log_snr": "logsnr lu lambdas lu_lambdas exponential log_linear loglinear snr",
        "ays_sd15": "ays align_your_steps aligned",
        "ays_sdxl": "ays align_your_steps aligned",
        "auto": "default automatic none",
    },
    "variant": {
        "log_rho": "logrho rho_log rho",
        "tab": "tab_deis tabdeis t_ab",
        "bh1": "b1 bh_1 b_1",
        "bh2": "b2 bh_2 b_2",
    },
    "convention": {"mirror": "diffusers ddim_inverse", "improved": "improved_diffusion improved_ddpm openai iddpm"},
    "method": {
        "plain": "cfg classifier_free_guidance none standard",
        "cfg_zero_star": "cfg_zero cfgzero cfg_zero* zero_star",
        "apg": "adaptive_projected_guidance projected",
    },
    "backend": {
        "reference": "torch pytorch eager python plain",
        "cpu": "c++ cpp native openmp avx512",
        "cuda": "gpu nvidia cuda_c++",
        "triton": "openai_triton",
    },
    "output": {"both": "epsilon_and_x0 epsilon_x0 halves"},
    "engine": {"torch": "torchrun distributed torch.distributed ddp"},
}

VALUES["target"] = VALUES["prediction"]
VALUES["output"] |= VALUES["prediction"]

# Of fastsample.Step: the attribute here, the words.
OF_STEP = {
    "x": "latents sample prev_sample latent x_t",
    "x0": "denoised pred_original_sample pred_xstart pred_x0 x0_pred",
    "index": "i step step_index step_idx row",
    "t": "timestep time timesteps",
    "sigma": "sigma_hat sigmas sigma_t",
    "alpha": "alpha_t",
}

# What pipelines ask their scheduler for.
OF_SCHEDULERS = (
    "config set_timesteps step timesteps sigmas add_noise scale_noise scale_model_input init_noise_sigma order "
    "num_inference_steps alphas_cumprod betas begin_index set_begin_index step_index index_for_timestep get_velocity "
    "previous_timestep from_config from_pretrained save_pretrained save_config compatibles register_to_config "
    "final_alpha_cumprod variance_type use_karras_sigmas convert_model_output"
)

_NOTES_OF = {_SHAPE: "x", _RANGE: "clip"}
ARGUMENTS = {
    word: Word(here, note, _NOTES_OF.get(note, "")) for here, note, words in _ARGUMENTS for word in words.split()
}

# Of arguments that only some functions have, words which elsewhere mean nothing in particular.
_NEARBY = {
    "weight": "guidance scale w",
    "rescale": "guidance_rescale",
    "interval": "guidance_interval start stop",
    "norm_threshold": "adaptive_projected_guidance_rescale threshold",
    "momentum": "adaptive_projected_guidance_momentum beta",
    "x": "sample samples state",
    "x0": "sample samples original_samples clean images",
    "model_output": "noise_pred model_out eps_pred v_pred output pred",
    "row": "timestep t step step_index i index_of_row k",
    "t": "timestep timesteps time times step sigmas",
    "shape": "size sizes dims image_size batch_size",
    "history": "model_outputs old_denoised ets",
    "samples": "images image img imgs tensor x pictures latents",
    "path": "file filename fname fp format name",
    "columns": "nrow nrows ncol ncols cols rows per_row",
    "padding": "pad pad_width gap",
    "value_range": "range normalize vmin vmax min max scale_each",
    "extra_args": "model_kwargs kwargs cond",
    "disable": "progress progress_bar verbose",
    "sigmas": "steps timesteps sigma schedule",
    "noise_sampler": "noise generator_of_noise",
    "max_order": "order",
    "solver_type": "solver variant",
    "alpha": "alphas alphas_cumprod",
    "sigma": "sigmas",
    "limit": "clip clamp clip_range",
    "quantile": "threshold ratio",
    "s": "noise std",
    "x_start": "x0 data",
}
NEARBY = {
    word: tuple(f"{here}=" for here, words in _NEARBY.items() if word in words.split())
    for word in " ".join(_NEARBY.values()).split()
}
