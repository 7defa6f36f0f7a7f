// Runs an AOTI engine without Python: fluxc-aoti ENGINE NEW_TOKENS BIASES PROMPT
//
// BIASES: one number a routable layer (inf: full, -inf: sparse), PROMPT: token ids; both separated by commas. Prints the
// routes, the logits after the prompt, and the greedy tokens. The hashes in engine.json are the caller's to compare.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "json.h"

using at::Tensor;
using Values = std::unordered_map<std::string, Tensor>;
using Loader = torch::inductor::AOTIModelPackageLoader;
constexpr int64_t PAGE = 64;

static Json json_of(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return JsonReader(text.str()).read();
}

// The tensors of a safetensors file as views of its mapping, which lives as long as the process.
static void map_weights(const std::string& path, Values& found) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat about {};
  if (file < 0 || fstat(file, &about) != 0) throw std::runtime_error("cannot read " + path);
  auto* data = static_cast<char*>(mmap(nullptr, about.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0));
  if (data == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  const auto length = *reinterpret_cast<uint64_t*>(data);
  const std::string header(data + 8, length);
  const std::map<std::string, at::ScalarType> types = {{"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16},
                                                       {"F64", at::kDouble}, {"I64", at::kLong}, {"I32", at::kInt},
                                                       {"BOOL", at::kBool}};
  for (const auto& [name, entry] : JsonReader(header).read().fields) {
    if (name == "__metadata__") continue;
    std::vector<int64_t> shape;
    for (const auto& size : entry["shape"].items) shape.push_back(size.integer());
    auto* begin = data + 8 + length + entry["data_offsets"].items[0].integer();
    found[name] = at::from_blob(begin, shape, at::TensorOptions(types.at(entry["dtype"].text)));
  }
}

// One program: its calls in order, each with a model whose constants are its own weights.
class Program {
 public:
  Program(const std::string& root, const Json& about, const Values& weights) : about_(about) {
    for (const auto& call : about["calls"].items) {
      models_.push_back(std::make_unique<Loader>(root + "/" + about["file"].text, call["piece"].text));
      std::unordered_map<std::string, Tensor> constants;
      for (const auto& name : models_.back()->get_constant_fqns())
        constants[name] = weights.at(call["weights"][name].text);
      if (!constants.empty()) models_.back()->load_constants(constants, false, true, /*user_managed=*/true);
    }
  }

  Values run(Values values) {
    for (size_t number = 0; number < models_.size(); ++number) {
      const auto& call = about_["calls"].items[number];
      std::vector<Tensor> taken;
      for (const auto& name : call["enters"].items) taken.push_back(value_of(values, name.text));
      const auto left = models_[number]->run(taken);
      for (size_t i = 0; i < left.size(); ++i) values[call["leaves"].items[i].text] = left[i];
    }
    Values outputs;
    for (const auto& [name, value] : about_["outputs"].fields) outputs[name] = values.at(value.text);
    return outputs;
  }

 private:
  static Tensor value_of(const Values& values, const std::string& name) {
    const auto bracket = name.find('[');
    if (bracket == std::string::npos) return values.at(name);
    return values.at(name.substr(0, bracket))[std::stoll(name.substr(bracket + 1))];
  }

  Json about_;
  std::vector<std::unique_ptr<Loader>> models_;
};

template <typename Value, typename Parse>
static std::vector<Value> split(const std::string& text, Parse parse) {
  std::vector<Value> found;
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) found.push_back(parse(part));
  return found;
}

struct Ring {
  int64_t sink, window;
  int64_t slot(int64_t p) const { return window && p >= sink ? sink + (p - sink) % window : p; }
  int64_t lens(int64_t tokens) const { return window ? std::min(tokens, sink + window) : tokens; }
};

// Sink and window of each attention under the routes, 0 and 0 where it keeps every token.
static std::vector<Ring> rings_of(const Json& engine, const Json& plan, const Tensor& routes) {
  std::vector<Ring> rings;
  for (const auto& layer : engine["layers"].items) {
    if (!layer["routable"].flag) {
      rings.push_back({0, layer["window"].integer()});
      continue;
    }
    const auto row = layer["row"].integer();
    const auto& sizes = plan["layers"].items[row];
    const bool keeps_all = routes[row][0].item<bool>() || plan["decode"].text == "full";
    rings.push_back(keeps_all ? Ring{0, 0} : Ring{sizes["sink"].integer(), sizes["window"].integer()});
  }
  return rings;
}

static void write_prompt(Tensor& cache, Values& prefill, size_t layer, const Ring& ring, int64_t base, int64_t tokens) {
  for (int64_t p = 0; p < tokens; ++p) {
    if (ring.window && p >= ring.sink && p + ring.window < tokens) continue;
    const auto slot = ring.slot(p);
    for (int64_t side = 0; side < 2; ++side) {
      const auto rows = prefill.at((side ? "v_" : "k_") + std::to_string(layer));
      cache[base + slot / PAGE][side].select(1, slot % PAGE).copy_(rows[0].select(1, p));
    }
  }
}

static int run(const std::string& root, int64_t count, const std::vector<float>& biases, std::vector<int64_t> ids) {
  const auto engine = json_of(root + "/engine.json"), plan = json_of(root + "/plan.json");
  const auto programs = json_of(root + "/programs.json");
  Values weights;
  for (const auto& file : std::filesystem::directory_iterator(root + "/weights")) map_weights(file.path(), weights);
  Program prefill(root, programs["programs"]["prefill"], weights), decode(root, programs["programs"]["decode"], weights);

  const auto length = static_cast<int64_t>(ids.size()), layers = static_cast<int64_t>(engine["layers"].items.size());
  const auto whole = at::full({1}, length, at::kLong);
  const auto bias = at::tensor(biases).view({-1, 1});
  auto first = prefill.run({{"input_ids", at::tensor(ids).view({1, -1})},
                            {"position_ids", at::arange(length, at::kLong).view({1, -1})},
                            {"seq_lens", whole},
                            {"prompt_lens", whole},
                            {"route_bias", bias},
                            {"logits_at", whole.view({1, 1}) - 1}});
  const auto rings = rings_of(engine, plan, first.at("routes"));
  const auto pages = (length + count + PAGE - 1) / PAGE;
  const auto k = first.at("k_0");
  auto cache = at::zeros({layers * pages, 2, k.size(1), PAGE, k.size(3)}, k.options());
  for (int64_t a = 0; a < layers; ++a) write_prompt(cache, first, a, rings[a], a * pages, length);
  const auto table = at::arange(layers * pages, at::kInt).view({layers, 1, pages});

  std::cout << "routes";
  for (int64_t row = 0; row < first.at("routes").size(0); ++row) std::cout << ' ' << first.at("routes")[row][0].item<bool>();
  auto logits = first.at("logits").view({1, -1});
  std::cout << "\nlogits" << std::scientific;
  for (int64_t i = 0; i < logits.size(1); ++i) std::cout << ' ' << logits[0][i].item<float>();
  std::cout << "\ntokens";
  for (int64_t step = 0; step < count; ++step) {
    const auto token = logits.argmax(1).view({1, 1});
    std::cout << ' ' << token.item<int64_t>();
    const auto position = length + step;
    auto slots = at::empty({layers, 1}, at::kLong), lens = at::empty({layers, 1}, at::kInt);
    for (int64_t a = 0; a < layers; ++a) {
      slots[a][0] = a * pages * PAGE + rings[a].slot(position);
      lens[a][0] = static_cast<int32_t>(rings[a].lens(position + 1));
    }
    logits = decode.run({{"input_ids", token},
                         {"position_ids", at::full({1, 1}, position, at::kLong)},
                         {"cache", cache},
                         {"slots", slots},
                         {"page_table", table},
                         {"lens", lens}})
                 .at("logits");
  }
  std::cout << std::endl;
  return 0;
}

int main(int count, char** words) {
  if (count != 5) {
    std::cerr << "fluxc-aoti ENGINE NEW_TOKENS BIASES PROMPT\n";
    return 2;
  }
  try {
    const c10::InferenceMode guard;
    return run(words[1], std::stoll(words[2]), split<float>(words[3], [](const std::string& x) { return std::stof(x); }),
               split<int64_t>(words[4], [](const std::string& x) { return std::stoll(x); }));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
