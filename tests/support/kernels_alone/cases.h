// The file of golden values, as values.py describes it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <istream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

struct Case {
    std::string kind, name;
    std::map<std::string, std::vector<std::string>> arrays;

    template <class T>
    std::vector<T> all(const std::string& array) const {
        const auto found = arrays.find(array);
        if (found == arrays.end()) throw std::runtime_error(kind + " " + name + " has no " + array);
        std::vector<T> values;
        for (const std::string& text : found->second) {
            if (std::is_floating_point<T>::value) {
                values.push_back(static_cast<T>(std::strtod(text.c_str(), nullptr)));
            } else {
                values.push_back(static_cast<T>(std::strtoull(text.c_str(), nullptr, 10)));
            }
        }
        return values;
    }

    template <class T>
    T one(const std::string& array) const {
        return all<T>(array).at(0);
    }
};

inline std::vector<Case> read_cases(std::istream& file) {
    std::vector<Case> cases;
    bool open = false;
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string first, word;
        if (!(words >> first)) open = false;
        if (first.empty() || first[0] == '#') continue;
        if (!open) {
            words >> word;
            cases.push_back({first, word, {}});
            open = true;
        } else {
            std::vector<std::string>& values = cases.back().arrays[first];
            while (words >> word) values.push_back(word);
        }
    }
    return cases;
}
