// A small transformer with a concatenation and two products: a constant token in front, sizes off
// the vector widths.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "core/masked_forward.h"
#include "naive_step.h"

// buffers, steps, constants, output and sites of a Network; what they point to lives in `arrays`.
template <typename Network>
Network token_steps(std::vector<Values>& arrays, std::mt19937& random) {
  const auto values = [&](std::int64_t size) {
    arrays.push_back(random_values(size, random));
    return arrays.back().data();
  };
  Network network;
  network.buffers = {{3, 11, 13}, {20, 5, 6},  {20, 31, 1}, {20, 31, 1}, {20, 31, 1}, {60, 31, 1},
                     {20, 31, 1}, {60, 31, 1}, {60, 1, 1},  {5, 1, 1},   {20, 31, 1}, {60, 1, 1},
                     {60, 31, 1}, {60, 31, 1}, {60, 1, 1},  {60, 31, 1}};
  network.constants = {{3, values(20 * 31)}};
  onp::StepSpec patches;  // 0 -> 1
  patches.kind = onp::StepKind::convolution;
  patches.kernel_height = patches.kernel_width = 2;
  patches.stride_height = patches.stride_width = 2;
  patches.weight = values(20 * 3 * 4);
  patches.first = onp::Activation::gelu;
  patches.final = 1;
  onp::StepSpec tokens;  // 1 -> 2, a row of zeros in front, and the constant added
  tokens.kind = onp::StepKind::pick;
  tokens.input = 1;
  for (std::int64_t i = 0; i < 31; ++i) tokens.index.push_back(i == 4 ? -1 : i * 7 % 30);
  tokens.residual = 3;
  tokens.final = 2;
  onp::StepSpec norm;  // 2 -> 4
  norm.kind = onp::StepKind::layer_norm;
  norm.input = 2;
  norm.value = 1e-3f;
  norm.scale = values(20);
  norm.shift = values(20);
  norm.site_start = 0;
  norm.final = 4;
  onp::StepSpec linear;  // 4 -> 5
  linear.kind = onp::StepKind::convolution;
  linear.input = 4;
  linear.weight = values(60 * 20);
  linear.bias = values(60);
  linear.final = 5;
  onp::StepSpec attention;  // 5 -> 10 unmasked, 6 masked
  attention.kind = onp::StepKind::attention;
  attention.input = 5;
  attention.others = {5, 5};
  for (std::int64_t i = 0; i < 60; ++i) attention.index.push_back(i * 7 % 60);
  attention.heads = 4;
  attention.value = 0.1f;
  attention.residual = 2;
  attention.plain = 10;
  attention.second = onp::Activation::gelu_tanh;
  attention.site_start = 20;
  attention.final = 6;
  onp::StepSpec together;  // 6, 10, 4 -> 7
  together.kind = onp::StepKind::concatenation;
  together.input = 6;
  together.others = {10, 4};
  together.scale = values(60);
  together.shift = values(60);
  together.second = onp::Activation::silu;
  together.final = 7;
  onp::StepSpec mean;  // 7 -> 8
  mean.kind = onp::StepKind::average_pool;
  mean.input = 7;
  mean.kernel_height = 31;
  mean.final = 8;
  onp::StepSpec gate = linear;  // 8 -> 11
  gate.input = 8;
  gate.weight = values(60 * 60);
  gate.first = onp::Activation::sigmoid;
  gate.final = 11;
  onp::StepSpec gated;  // 7 times the one pixel of 11 -> 12
  gated.kind = onp::StepKind::product;
  gated.input = 7;
  gated.others = {11};
  gated.first = onp::Activation::hard_swish;
  gated.site_start = 40;
  gated.final = 12;
  onp::StepSpec both;  // 12 times 7 -> 13
  both.kind = onp::StepKind::product;
  both.input = 12;
  both.others = {7};
  both.second = onp::Activation::hard_sigmoid;
  both.final = 13;
  onp::StepSpec groups;  // 13 -> 15
  groups.kind = onp::StepKind::group_norm;
  groups.input = 13;
  groups.heads = 4;
  groups.value = 1e-2f;
  groups.final = 15;
  onp::StepSpec again = mean;  // 15 -> 14
  again.input = 15;
  again.final = 14;
  onp::StepSpec head = linear;  // 14 -> 9
  head.input = 14;
  head.weight = values(5 * 60);
  head.bias = nullptr;
  head.final = 9;
  network.steps = {patches, tokens, norm, linear, attention, together, mean,
                   gate,    gated,  both, groups, again,     head};
  network.output = 9;
  network.sites = 100;
  return network;
}
