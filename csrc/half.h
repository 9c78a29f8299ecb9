// IEEE binary16 in scalar integer arithmetic, for code that runs on every CPU: rounds to nearest even.
// Static, not inline: a copy compiled for a wider ISA must never be the one the linker keeps.
#pragma once
#include <cstdint>
#include <cstring>

namespace octavo {

static inline float f16_to_f32(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  uint32_t bits = magnitude;
  float value;
  memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  memcpy(&bits, &value, 4);
  if (magnitude >= (0x7c00u << 13)) bits |= 0x7f800000u;
  bits |= (h & 0x8000u) << 16;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t f32_to_f16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// The OCP 8-bit float with 4 bits of exponent; not NaN.
static inline float e4m3_to_f32(uint8_t code) {
  return f16_to_f32(static_cast<uint16_t>((code & 0x80u) << 8 | (code & 0x7fu) << 7)) * 256.0f;
}

static inline float bf16_to_f32(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace octavo
