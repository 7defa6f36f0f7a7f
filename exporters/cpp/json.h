// A reader for the JSON that fluxc and safetensors write. Throws std::runtime_error where text is no JSON.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum Kind { Null, Bool, Number, String, Array, Object } kind = Null;
  bool flag = false;
  double number = 0;
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> fields;

  const Json& operator[](const std::string& key) const {
    const auto found = fields.find(key);
    if (found == fields.end()) throw std::runtime_error("no key '" + key + "' in JSON");
    return found->second;
  }
  int64_t integer() const { return static_cast<int64_t>(number); }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json read() {
    Json value;
    switch (next()) {
      case '{':
        value.kind = Json::Object;
        members('}', [&] {
          auto key = read().text;
          expect(':');
          value.fields[key] = read();
        });
        break;
      case '[':
        value.kind = Json::Array;
        members(']', [&] { value.items.push_back(read()); });
        break;
      case '"':
        value.kind = Json::String;
        value.text = string();
        break;
      case 't': value.kind = Json::Bool; value.flag = true; at_ += 4; break;
      case 'f': value.kind = Json::Bool; at_ += 5; break;
      case 'n': at_ += 4; break;
      default: value.kind = Json::Number; value.number = parse_number();
    }
    return value;
  }

 private:
  char next() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
    if (at_ >= text_.size()) throw std::runtime_error("JSON ends early");
    return text_[at_];
  }

  void expect(char wanted) {
    if (next() != wanted) throw std::runtime_error(std::string("JSON lacks ") + wanted);
    ++at_;
  }

  template <typename Member>
  void members(char end, Member member) {
    ++at_;
    for (bool first = true; next() != end; first = false) {
      if (!first) expect(',');
      member();
    }
    ++at_;
  }

  double parse_number() {
    const char* begin = text_.c_str() + at_;
    char* end = nullptr;
    const double value = std::strtod(begin, &end);
    if (end == begin) throw std::runtime_error("no JSON value");
    at_ += static_cast<size_t>(end - begin);
    return value;
  }

  std::string string() {
    std::string found;
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] == '\\') ++at_;  // names of tensors and values need no other escapes
      found += text_[at_];
    }
    ++at_;
    return found;
  }

  const std::string& text_;
  size_t at_ = 0;
};
